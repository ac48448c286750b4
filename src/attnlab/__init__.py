"""attnlab: a theory lab for attention in JAX.

Importing the package changes no global setting of JAX; 64-bit mode is the command line's or the user's choice.
"""

from importlib.metadata import version

__version__ = version("attnlab")
