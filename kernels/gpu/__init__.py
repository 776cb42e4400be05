"""What the GPU implementations share: Triton's for all chips (kernels/triton) and Hopper's own (kernels/hopper).

chips tells GPUs apart, compile_once has the processes of a host compile a kernel once, launcher launches compiled ones
at little cost, by direct_launch where it can, modifiers_given and operands_given say what is wrong with a call,
block_lists holds which blocks a tile works on, and row_blocks reads and writes blocks of rows. Kernels that both use
are row_delta, sink_gradient and add_rows. Others serve around attention: lay_rows, round_numbers, and elementwise for
models. recording notes what a call asks for, so that calls alike can go down a list.
"""
