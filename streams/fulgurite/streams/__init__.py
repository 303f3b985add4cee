"""Stateful programs over the log: assembler, trainer, embedded policy server. Only here may torch be imported."""
