"""Verify that base and adapter still answer as when the stage was saved; else say why not.

First what can be told without a model: the file against its record, the base's weights and the
tokenizer against what is on record. Then the recorded probe is replayed, by the base alone and by
base and adapter together. Where answers differ, one thing after another is changed and replayed
again, until it comes out: that is the cause.
"""

from lamina.stages.verify.contents import Contents, contents_of
from lamina.stages.verify.report import Cause, Check, VerifyReport
from lamina.stages.verify.verifying import examine, verify

__all__ = ["Cause", "Check", "Contents", "VerifyReport", "contents_of", "examine", "verify"]
