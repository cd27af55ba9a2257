"""The exceptions: their exit statuses, and that they survive the way between processes."""

from __future__ import annotations

import inspect
import pickle

from cnnpipe import errors
from cnnpipe.errors import CnnpipeError, ImageError, one_line


def _real_classes() -> dict[str, type[CnnpipeError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, CnnpipeError)
    }


def test_exit_status_is_1_but_for_usage_and_the_failure_budget() -> None:
    other = {name: value.exit_status for name, value in _real_classes().items() if value.exit_status != 1}
    assert other == {"UsageError": 2, "FailureBudgetError": 3}


def test_image_error_keeps_its_kind_through_pickle() -> None:
    copy = pickle.loads(pickle.dumps(ImageError("truncated", "ends after 12 bytes")))
    assert (type(copy), copy.kind, str(copy)) == (ImageError, "truncated", "ends after 12 bytes")


def test_every_other_error_keeps_its_message_through_pickle() -> None:
    for error in _real_classes().values():
        if error is not ImageError:
            copy = pickle.loads(pickle.dumps(error("what, received, how to fix")))
            assert (type(copy), str(copy)) == (error, "what, received, how to fix")


def test_text_of_a_library_becomes_one_line_that_keeps_its_start_and_its_end() -> None:
    assert one_line(ValueError("as it\n  is")) == "as it is"
    assert one_line("first " + "x" * 5000 + " last", 20) == "first xxx …xxxx last"
    assert [len(one_line("x" * 50, length)) for length in (3, 4, 49, 50, 51)] == [3, 4, 49, 50, 50]
