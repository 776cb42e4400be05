"""What the GPU implementations share: Triton's for all chips (kernels/triton) and Hopper's own (kernels/hopper).

chips tells GPUs apart, compile_once has the processes of a host compile a kernel once, launcher launches compiled ones
at little cost, modifiers_given and operands_given say what is wrong with a call, row_blocks reads and writes blocks of
rows, and row_delta is the one kernel that both use.
"""
