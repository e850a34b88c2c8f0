"""Files that appear complete or not at all, safe reading, and packages that may be missing.

`atomic` writes, `safe_pickle` reads without running code, `optional_import` names the extra to
install, `user_modules` imports modules of the user's own.
"""
