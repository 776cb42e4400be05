"""SageMaker's attention modules on these kernels: where a script says `torch.sagemaker`, say `ringflash.sagemaker`."""

from ringflash.sagemaker import nn

__all__ = ["nn"]
