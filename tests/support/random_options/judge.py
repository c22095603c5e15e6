"""What is wrong with how the commands of a scene ended: nothing, as a rule."""

import dataclasses
import json
from pathlib import Path

from random_options.forks import End
from random_options.scene import Command

OK, FAILED, USAGE, LACKING, INTERRUPTED = 0, 1, 2, 4, 130
_NEVER_SAID = (
    "Traceback",
    "Exception ignored",
    "Fatal Python error",
    "Warning: ",
    "Error: ",
    "internal error: ",
    "object has no",
)
# What the last words of a command that measures begin with: what it lacks or has lost is said of each contender.
_LAST_WORDS = ("kvmdp: ", "skipped ", "FAILED ", "FELL SHORT: ")
_RECORDS = Path("/run/kvmdp")
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command, how it ended, and what it said."""

    command: Command
    end: End
    out: str
    err: str
    stacks: str

    @property
    def excused(self):
        """Whether it has a reason of its own not to have ended with 0, which may be the reason of others too."""
        return self.end.status in (USAGE, LACKING) or (self.end.status == FAILED and self.command.may_fail)

    def __str__(self):
        said = "".join(
            f"      {line}\n" for line in [*self.out.splitlines()[-8:], *self.err.splitlines()[-20:]]
        )
        return f"    {self.command}\n      ended with {self.end.status}\n{said}{self.stacks}".rstrip()


def findings(ended, folder, inputs):
    """Return a sentence for each thing that is wrong. `inputs` are the files that were there, name -> `what`."""
    found = []
    others_excused = any(each.excused for each in ended)
    for each in ended:
        words = [*_end(each, others_excused), *_words(each)]
        if not words:
            words = [*_document(each, folder / "work", inputs)]
        found += [f"{each.command.name}: {word}" for word in words]
    return [*found, *_left(ended, folder, inputs)]


def _end(ended, others_excused):
    command, end = ended.command, ended.end
    if end.hung:
        yield "it did not end"
    elif end.status < 0:
        yield f"signal {-end.status} ended it"
    elif command.refused and end.status not in (USAGE, LACKING):
        yield f"what makes no sense was not refused: status {end.status}"
    elif end.status == FAILED and not (command.may_fail or others_excused):
        yield "it failed"
    elif end.status == INTERRUPTED and not command.served:
        yield "it says that it was interrupted"
    elif end.status not in (OK, FAILED, USAGE, LACKING, INTERRUPTED):
        yield f"it ended with {end.status}"
    if end.left:
        yield "it left processes behind"


def _words(ended):
    err = ended.err
    for word in _NEVER_SAID:
        if word in ended.out or word in err:
            yield f"it said {word!r}"
    if ended.end.status == OK or ended.end.hung:
        return
    lines = err.splitlines()
    last = _LAST_WORDS if ended.command.name in ("bench", "compare") else _LAST_WORDS[:1]
    if not lines or not lines[-1].startswith(last):
        yield "its last word is not why it failed"
    if sum(line.startswith("kvmdp: ") for line in lines) > 1:
        yield "it gave several reasons"
    if ended.end.status == USAGE and (ended.out or len(lines) > 3):
        yield "it worked before it refused"


def _document(ended, work, inputs):
    """Look at the JSON that was asked for."""
    command, status = ended.command, ended.end.status
    target = command.given.get("--json")
    if target is None or status in (USAGE, INTERRUPTED) or target.startswith("/dev/"):
        return
    path = work / target
    there = target == "-" or (path.exists() and what(path) != inputs.get(target))
    if not there and status != OK:
        return
    text = ended.out if target == "-" else path.read_text() if there else ""
    if not text and status != OK:
        return
    try:
        document = json.loads(text)
    except ValueError:
        yield "what it wrote is no JSON"
        return
    if command.name == "run":
        yield from _run_document(command, status, document)
    elif command.name in ("bench", "compare") and status == OK and not _is_complete(document):
        yield "it ended with 0, but its result is not complete"


def _run_document(command, status, document):
    if document["ok"] is not (status == OK):
        yield f"it ended with {status}, and ok is {document['ok']}"
    if document.get("wrong_pages") or document.get("leaks"):
        yield f"pages are wrong: {document.get('wrong_pages')}, leaks: {document.get('leaks')}"
    if status == FAILED and "error" not in document and "/dev/full" not in command.arguments:
        yield "it failed without an error"
    if document["vcpus"] != int(command.given.get("--vcpus", 1)):
        yield f"it had {document['vcpus']} vCPUs"
    if (asked := command.given.get("--trap", "auto")) != "auto":
        found = document["trap"] + ":device-view" * document["device_view"]
        if found != asked:
            yield f"it had the trap {found}"


def _is_complete(document):
    return document["complete"] and not document["failed"]


def _left(ended, folder, inputs):
    """Look for what is left, and for what was not to be touched."""
    if left := [each.name for each in (folder / "tmp").iterdir()]:
        yield f"temporary files are left: {', '.join(left)}"
    outputs = (
        {"result.json", "trace.jsonl", "report", "ram"}
        if any(not each.end.status for each in ended)
        else set()
    )
    if any("ram has the guest's RAM" in each.err for each in ended):
        outputs.add("ram")
    if any(each.end.status == FAILED for each in ended):
        outputs |= {"result.json", "trace.jsonl"}
    if any("report written: " in each.err for each in ended):  # also if another result could not be
        outputs.add("report")
    now = {each.name: what(each) for each in (folder / "work").iterdir()}
    if left := now.keys() - inputs.keys() - outputs:
        yield f"files are left: {', '.join(sorted(left))}"
    changed = {name for name in inputs if now.get(name) != inputs[name]} - outputs - {"disk"}
    if changed:
        yield f"files have changed: {', '.join(sorted(changed))}"


def what(path):
    """Return what there is to say of a file that may not change."""
    about = path.lstat()
    return about.st_mode, about.st_size, about.st_mtime_ns


def huge_pages():
    """Return what a run may change of the pool of huge pages, and has to change back; and the records of that."""
    files = [_POOL / name for name in ("nr_hugepages", "nr_overcommit_hugepages", "resv_hugepages")]
    return [int(file.read_text()) for file in files if file.exists()], sorted(_RECORDS.glob("*"))
