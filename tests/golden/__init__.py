"""Golden numbers of the original implementations: `python -m tests.golden DIR` checks a folder of them.

`dssn` computes what DSSN's code computed, `vits` what UniMatch V2's code and Hugging Face's DINOv3 did. This module
imports nothing, so that the command can set up JAX first.
"""
