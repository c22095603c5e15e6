"""All forms."""

from collections import Counter

from .families import integer, stack, steps, strings, system, vector
from .form import Form

FORMS: tuple[Form, ...] = tuple(
    form for family in (integer, stack, strings, vector, system, steps) for form in family.FORMS
)

_twice = [name for name, count in Counter(form.name for form in FORMS).items() if count > 1]
assert not _twice, f"two forms have one name: {', '.join(_twice)}"
