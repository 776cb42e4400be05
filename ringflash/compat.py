"""Packages of this library under the names of those that they stand in for.

    import ringflash.compat
    ringflash.compat.install("flash_attn")
    from flash_attn import flash_attn_func                  # ringflash.flash_attn's

For code that is not yours to change. Where it is, import `ringflash.flash_attn` instead.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

from ringflash.errors import ArgumentError

PACKAGES = {
    "flash_attn": "ringflash.flash_attn",
    "ring_flash_attn": "ringflash.ring_flash_attn",
    "yunchang": "ringflash.yunchang",
}
"""What stands in for a name."""


def install(name: str) -> None:
    """Let `import name`, and imports of its modules, find this library's package.

    The modules are the same objects under both names. Call it before whatever imports the name; a second call changes
    nothing. A package of that name that is installed but not yet imported is not found any more by this process.

    Hugging Face's `is_flash_attn_2_available` asks for the installed package's metadata, which this does not forge:
    `attn_implementation="flash_attention_2"` goes on asking for the real one. Use `"ring"` of `ringflash.transformers`.

    Args:
        name: one of `PACKAGES`.

    Raises:
        ArgumentError: there is nothing for this name, or a package of this name is imported already.

    Example:
        >>> install("flash_attn")
        >>> from flash_attn.bert_padding import unpad_input
    """
    if name not in PACKAGES:
        raise ArgumentError(f"name={name!r}; allowed are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    modules = {name + full.removeprefix(package): module for full, module in _modules(package).items()}
    for taken, found in list(sys.modules.items()):
        if (taken == name or taken.startswith(name + ".")) and found is not modules.get(taken):
            raise ArgumentError(
                f"name={name!r}, but {taken} is imported already, from {getattr(found, '__file__', None)}; call "
                "ringflash.compat.install before anything imports it"
            )
    sys.modules.update(modules)


def _modules(package: str) -> dict[str, ModuleType]:
    """A package and all modules in it by their names."""
    top = importlib.import_module(package)
    names = [found.name for found in pkgutil.walk_packages(top.__path__, package + ".")]
    return {package: top} | {name: importlib.import_module(name) for name in names}
