"""Tersor beside the tools that a user would pick instead: same models, same calibration data, one judge.

    script/bench setup all
    script/bench peers --models minilm,babyllama,pylm,resnet56

Every peer runs in its own environment through a small adapter, which hands back its dequantised weights and the bytes
that its format stores; what fails is a row with its reason.
"""
