"""``tierflow tune``: finds how a drive is read and written fastest here, and writes it down. Imports no torch.

``device`` looks, ``load`` measures one setting, ``search`` chooses the next, ``profile`` is what stays.
"""
