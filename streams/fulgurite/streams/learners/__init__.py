"""Learners: from samples to new weights. One optimizer step a window, on one device or on many.

| file | holds |
|---|---|
| `packing.py` | samples -> micro-batches of packed sequences, equally many on every rank |
| `attention.py` | exact attention over packed sequences |
| `scoring.py` | log p and entropy a chunk of the vocabulary's logits at a time |
| `policy.py` | a Hugging Face model that scores packed sequences |
| `allocator.py` | on a CPU: freed chunks go back |
| `reference.py` | the frozen one of a KL penalty |
| `metrics.py` | what a step's tokens looked like, and whether that forbids it |
| `schedule.py` | the learning rate |

Knows neither Kafka nor windows nor versions on disk.
"""
