"""Automatic prompt optimisation: beam search over critiques and edits of a prompt template, with agents as the judges.

search.py      pure: candidates, rounds, the beam, budgets: all that is remembered
critic.py      the model that says what is wrong with a template, and writes a better one
reading.py     Kafka: rewards of the candidates' rollouts, and what was said in them
publishing.py  the transactions
service.py     the flow and its delivery contract: begin here

After ProTeGi (arXiv:2305.03495): a critique of a prompt by its failures is its "textual gradient", an edit that heeds
it a step. Agents get the template by `rollout.prompt_template(name)` (fulgurite.producers.prompts).
"""

from fulgurite.streams.algorithms.prompts.service import main, serve

__all__ = ["main", "serve"]
