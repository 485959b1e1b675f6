"""The passes of the fused loss over a chunk's vocabulary: in torch for any device, in Triton for CUDA.

`tail.py` says what they compute; `eager.py` and `triton_tail.py` are the two that do.
"""
