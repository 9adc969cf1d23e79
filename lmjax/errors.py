"""The one exception for input a person can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one sentence that names the thing and the mend.

    Entry points print the sentence without a traceback and exit with status 2.
    """
