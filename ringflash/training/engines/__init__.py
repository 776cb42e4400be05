"""How parameters, gradients and optimizer state live on the ranks: DDP, or DeepSpeed ZeRO 1, 2 and 3."""
