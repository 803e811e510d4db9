"""Conformance: what every registered method promises, as checks that anybody can run on a method of their own.

    from cairn.testing import check_method
    check_method("operation", "away")

Each kind of method has one suite. A suite makes its own small material, tries the method and raises `AssertionError` with a sentence for the
first promise that is broken. `checks` gives the same one by one, for a test runner:
`@pytest.mark.parametrize("check", checks("operation", "away"), ids=str)`.

- operation, growth, compression, adaptation: default options and every choice of every option; the same bits, everything kept, strangers refused.
- ingredients (field, objective, adapter, optimizer, schedule, reweighting, filter, callback): a stop and a resume change no bit.
- measurement: the same figures each time, one at a time or many at once, in one process or two, kept under the digest of what was measured.
- study: what it states, and a negative control that fails what the honest runs show.
"""

from cairn.testing.suites import Check, Suite, check_method, checks, choices, demand, kinds, options_round_trip, suite

__all__ = ["Check", "Suite", "check_method", "checks", "choices", "demand", "kinds", "options_round_trip", "suite"]
