"""Types, as type checkers see them; and the stubs that tell them more."""
