"""One training step under every contender: what ``bench_train.py`` runs.

``contenders`` says who takes part, ``runner`` starts each in a process of its own, ``process`` is that process, and
``plain_torch``, ``with_deepspeed`` and ``with_tierflow`` are the drivers it chooses from. What runs in such a process
imports torch, transformers and the driver's own engine alone, so DeepSpeed may live in another environment.
"""
