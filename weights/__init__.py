"""Where every model file comes from, and the only code that fetches or stores one.

Callers need `weights.cache.ensure(name, edition)`; `weights.catalog` is the table behind it.
"""
