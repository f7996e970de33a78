"""What users get wrong, and what they are told: one table, every line run by the real command.

Each line is a working job with one thing wrong. The command must end with the right exit code and
say, in at most three lines and without a traceback, what is wrong and what to do next.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

NEEDS_S3 = [pytest.mark.s3]
S3_KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}
NO_SERVER = "http://127.0.0.1:9"
SECRET = "p4ssw0rd"  # must never be seen in any answer
GONE = object()
"""As a job key's value: the key is taken out."""


def parquet(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


ROWS = parquet(id=[1, 2], en=["one two", "three"])
JOB: dict[str, Any] = {
    "name": "mistakes",
    "task": {"kind": "translate", "text": "en", "source": "en", "target": "ko"},
    "input": {"path": "in"},
    "output": {"path": "out", "column": "ko"},
    "model": {"id": "any", "backend": "echo"},
}
FILES = {"in/a.parquet": ROWS, "heads/config.json": b'{"num_attention_heads": 64}'}


@dataclass(frozen=True)
class Mistake:
    exit: int
    says: Sequence[str]
    """What the message must contain: the key, file or column, and what is wrong with it."""
    next: str
    """What the message must contain for the user to go on."""
    job: Mapping[str, Any]
    text: bytes | None
    files: Mapping[str, bytes | None]
    command: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    after_run: bool


def wrong(
    name: str,
    exit: int = 2,
    *,
    says: str | Sequence[str],
    next: str,
    job: Mapping[str, Any] | None = None,
    text: bytes | None = None,
    files: Mapping[str, bytes | None] | None = None,
    command: str = "validate",
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    after_run: bool = False,
    marks: Sequence[pytest.MarkDecorator] = (),
) -> Any:
    """One line of the table. `job` sets dotted keys of the job file, `text` replaces the file,
    `files` adds files (None: an empty folder), `after_run` makes the mistake once the job ran."""
    says = [says] if isinstance(says, str) else says
    mistake = Mistake(
        exit, says, next, job or {}, text, files or {}, command, arguments, env or {}, after_run
    )
    return pytest.param(mistake, id=name.replace(" ", "-"), marks=list(marks))


TP = "model.engine.tensor_parallel_size"
VLLM = {"model.backend": "vllm"}
HTTP = {"model.backend": "http", "model.base_url": f"{NO_SERVER}/v1"}
CHAT = {"kind": "chat", "messages": "en"}

PROMPT = {"kind": "prompt", "prompt": "{{ en }}"}
EXTRACT = {"kind": "extract", "text": "en"}
SEVERAL_TYPES = {"type": "object", "properties": {"price": {"type": ["integer", "string"]}}}

# fmt: off
JOB_FILE = [
    wrong("input on the web", job={"input.path": "https://host.example/a.parquet"},
          says="input.path: must be a local path, s3:// or hf://", next="download it first"),
    wrong("unknown key at the top", job={"smapling": {"temperature": 0}},
          says="smapling: unknown key", next="Did you mean `sampling`?"),
    wrong("unknown key in a section", job={"sampling.temprature": 0.5},
          says="sampling.temprature: unknown key", next="Did you mean `temperature`?"),
    wrong("unknown key in the task", job={"task.instrutions": "Be brief."},
          says="task.instrutions: unknown key", next="Did you mean `instructions`?"),
    wrong("unknown key like no other", job={"limits.zzz": 1},
          says="limits.zzz: unknown key",
          next="Known keys here: max_engine_silence_s, max_failed_fraction."),
    wrong("wrong type", job={"sampling.temperature": "hot"},
          says=["job.yaml: sampling.temperature", "(it is 'hot')"],
          next="should be a valid number"),
    wrong("value out of range", job={"cluster.replicas": 0},
          says="cluster.replicas", next="must be at least 1 (it is 0)"),
    wrong("min above max", job={"cluster.replicas": {"min": 3, "max": 2}},
          says="cluster.replicas", next="`min` is larger than `max`"),
    wrong("range without max", job={"cluster.replicas": {"min": 3}},
          says="cluster.replicas.max", next="is missing"),
    wrong("not one of the choices", job={"model.backend": "vlm"},
          says=["model.backend", "(it is 'vlm')"], next="'vllm', 'http' or 'echo'"),
    wrong("missing key", job={"output.column": GONE},
          says="job.yaml: output.column", next="is missing"),
    wrong("no input at all", job={"input": {}},
          says="input:", next="give either `path` or `dataset`"),
    wrong("empty list of paths", job={"input.path": []},
          says="input.path", next="path"),
    wrong("not YAML", text=b"name: t\ninput: [\n",
          says="job.yaml, line 3: not valid YAML", next="expected"),
    wrong("template without quotes", text=b"task:\n  kind: prompt\n  prompt: {{ title }}\n",
          says="job.yaml, line 3: not valid YAML", next="put it in quotes"),
    wrong("date that is none", text=b"name: t\nfrom: 2025-06-31\n",
          says="job.yaml: not valid YAML: day is out of range", next="in quotes"),
    wrong("key that is a type's name", job={"int": 1},
          says="int: unknown key", next="Did you mean"),
    wrong("option with dashes", job={"model.engine": {"max-num-seqs": 4}},
          says="model.engine", next="write `max_num_seqs`"),
    wrong("port that is none", job={"model.backend": "http", "model.base_url": "http://h:PORT/v1"},
          says="model.base_url", next="is no address"),
    wrong("tab in YAML", text=b"name: t\n\ttask: {}\n",
          says="job.yaml, line 2: not valid YAML", next=r"found character '\t'"),
    wrong("not UTF-8", text=b"name: \xff\n",
          says="job.yaml: is not UTF-8 text", next="Save it as UTF-8"),
    wrong("list in place of keys", text=b"- name: t\n",
          says="job.yaml: is not a job file", next="no keys at the top"),
    wrong("no such job file", arguments=["nowhere.yaml"],
          says="nowhere.yaml: no such job file", next="See configs/"),
    wrong("unknown task kind", job={"task.kind": "translat"},
          says="task.kind: unknown kind `translat`", next="Did you mean `translate`?"),
    wrong("task without kind", job={"task.kind": GONE},
          says="task: needs a `kind`", next="`kind: translate`"),
    wrong("same languages", job={"task.source": "ko"},
          says="task: ", next="`source` and `target` are the same language"),
    wrong("template that is none", job={"task": {**PROMPT, "prompt": "Describe {{ en }."}},
          says="task.prompt: line 1: unexpected '}'", next="a Jinja template"),
    wrong("template without columns", job={"task": {**PROMPT, "prompt": "Describe {en}."}},
          says="task.prompt: names no column", next="write {{ title }} for the column `title`"),
    wrong("template of another file", job={"task": {**PROMPT, "system": "{% include 'a' %}"}},
          says="task.system: line 1: a template can't use another file", next="a template as well"),
    wrong("schema without names", job={"task": {**EXTRACT, "schema": {"type": "object"}}},
          says="task.schema: $: its properties have no names", next="list them in `properties`"),
    wrong("schema of several types", job={"task": {**EXTRACT, "schema": SEVERAL_TYPES}},
          says="task.schema: $.price: may be of several types (integer, string)",
          next="choose one"),
    wrong("schema that is none", job={"task": {**EXTRACT, "schema": {"type": "objct"}}},
          says="task.schema: is no JSON Schema: at type", next="'objct' is not one of"),
    wrong("pydantic class nowhere", job={"task": {**EXTRACT, "schema": "nowhere:Order"}},
          says="task.schema: `nowhere:Order` can't be imported", next="No module named 'nowhere'"),
    wrong("pydantic class that is none", job={"task": {**EXTRACT, "schema": "json:loads"}},
          says="task.schema: `json:loads` is no pydantic class", next="json:loads"),
    wrong("function that is nowhere", job={"task": {**CHAT, "functions": {"f": "my_tools:f"}}},
          says=["job.yaml: task.functions: f: `my_tools:f` can't be imported", "ModuleNotFound"],
          next="The module is in the current directory or installed"),
    wrong("several answers in place of one", job={"task": {**CHAT, "n": 3}},
          says="task: `n` is only seen in the whole answer", next="set `returns: response`"),
    wrong("messages and bodies", job={"task": {**CHAT, "body": "en"}},
          says="task: ", next="give either `messages` or `body`"),
    wrong("set without value", arguments=["job.yaml", "--set", "output"],
          says="--set output: not of the form a.b=c", next="--set output.path=out"),
    wrong("set below a value", arguments=["job.yaml", "--set", "name.first=x"],
          says="--set name.first=x", next="`name` holds a value, not further keys"),
    wrong("set to broken YAML", arguments=["job.yaml", "--set", "input.path=[a"],
          says="--set input.path=[a", next="not valid YAML"),
    wrong("unknown option", arguments=["job.yaml", "--dry-run"],
          says="unrecognized arguments: --dry-run", next="usage: axbatch"),
]

INPUT = [
    wrong("missing column", job={"task.text": "body"},
          says=["in/a.parquet: has no column `body`", "it has id, en"],
          next="Name one of these under `task:`"),
    wrong("unknown column in a template", job={"task": {**PROMPT, "prompt": "{{ en }} {{ ko }}"}},
          says=["in/a.parquet: has no column `ko`", "it has id, en"],
          next="Name one of these under `task:`"),
    wrong("missing column in a staged file", job={"input.path": "lines/*.jsonl"},
          files={"lines/b.jsonl": b'{"body": "x"}\n'},
          says=["lines/b.jsonl: has no column `en`"], next="Name one of these under `task:`"),
    wrong("no such path", job={"input.path": "nowhere"},
          says="nowhere: no such file or folder", next="Check `input.path`"),
    wrong("glob without match", job={"input.path": "in/*.pq"},
          says="in/*.pq: no file matches", next="Check `input.path`"),
    wrong("empty folder", job={"input.path": "empty"}, files={"empty": None},
          says="empty: the folder is empty", next="Check `input.path`"),
    wrong("truncated Parquet", files={"in/b.parquet": ROWS[:300]},
          says="in/b.parquet: not readable as Parquet", next="Replace or remove the file"),
    wrong("text named parquet", files={"in/b.parquet": b"id,en\n1,one two\n"},
          says="in/b.parquet: not readable as Parquet", next="Replace or remove the file"),
    wrong("unknown suffix", files={"in/b.xlsx": b"PK"},
          says="in/b.xlsx: not a kind of file that can be read", next="Known: .parquet, .jsonl"),
    wrong("two files of one name", job={"input.path": ["in", "more"]},
          files={"more/a.parquet": ROWS},
          says="two input files would both become a.parquet", next="Rename one"),
    wrong("one file named twice", job={"input.path": ["in", "in/a.parquet"]},
          says="in/a.parquet: more than one entry of input.path names it",
          next="Leave it to one of them"),
    wrong("unknown storage", job={"input.path": "foo://bucket/x"},
          says="foo://bucket/x", next="Known: local paths, s3://, hf://"),
    wrong("hub input and no network", 1, job={"input.path": "hf://datasets/a/b"},
          env={"HF_ENDPOINT": NO_SERVER}, says="hf://datasets/a/b", next="network"),
]

OUTPUT = [
    wrong("output is the input", job={"output.path": "in"},
          says=["output.path", "lies inside the input folder"], next="put `output.path` beside"),
    wrong("output inside the input", job={"output.path": "in/out"},
          says=["output.path", "lies inside the input folder"], next="put `output.path` beside"),
    wrong("output is the input by a detour", job={"output.path": "heads/../in"},
          says=["output.path", "lies inside the input folder"], next="put `output.path` beside"),
    wrong("output is a file", job={"output.path": "job.yaml"},
          says="job.yaml", next="`output.path`"),
    wrong("result column there already", job={"output.column": "en"},
          says="in/a.parquet: already has a column `en`", next="Choose another `output.column`"),
    wrong("result column is a status column", job={"output.column": "_status"},
          says="_status", next="output.column"),
    wrong("foreign file in the output", 4, files={"out/a.parquet": ROWS},
          says="out/a.parquet: is there already and is not axbatch's",
          next="Choose an empty `output.path`"),
    wrong("foreign text in the output", 4, files={"out/a.parquet": b"not ours"},
          says="out/a.parquet", next="output.path"),
    wrong("changed identity", 4, after_run=True,
          job={"sampling": {"temperature": 0.7}},
          says="sampling.temperature: was 0.0, is 0.7", next="give the job a new `output.path`"),
    wrong("changed input file", 4, after_run=True,
          files={"in/a.parquet": parquet(id=[1], en=["changed"])},
          says="a.parquet: its input file has changed", next="`input.on_change: reprocess`"),
    wrong("vanished input file", 4, after_run=True,
          job={"input.path": "new"}, files={"new/b.parquet": parquet(id=[1], en=["new"])},
          says="out/a.parquet: its input file is not among the input any more",
          next="`input.on_change: reprocess`"),
    wrong("verify before the end", 1, command="verify",
          says="a.parquet: not published, 2 of 2 rows", next="Run the job to its end first"),
]

MODEL = [
    wrong("http without base_url", job={"model.backend": "http"},
          says="model:", next="`base_url` is needed with `backend: http`"),
    wrong("http server down", 1, command="run", job=HTTP, marks=[pytest.mark.ray],
          says=f"{NO_SERVER}/v1: no answer", next="Start the server"),
    wrong("folder without model", job={**VLLM, "model.id": "./bare"}, files={"bare": None},
          says=["model.id", "bare holds no config.json"], next="Give a folder with config.json"),
    wrong("config that is no object", job={**VLLM, "model.id": "./odd"},
          files={"odd/config.json": b"[1]"}, says="config.json", next="Give a folder"),
    wrong("neither folder nor hub id", job={**VLLM, "model.id": "a/b/c"},
          says="model.id: `a/b/c`", next="neither a local folder nor a hub id (owner/name)"),
    wrong("model nowhere and hub offline", job={**VLLM, "model.id": "some/where"},
          env={"HF_HUB_OFFLINE": "1"},
          says="model.id: `some/where` is no local folder", next="or give a local folder"),
    wrong("model nowhere and hub away", job={**VLLM, "model.id": "some/where"},
          env={"HF_ENDPOINT": NO_SERVER},
          says="model.id: `some/where` is no local folder", next="or give a local folder"),
    wrong("heads that do not divide", job={**VLLM, "model.id": "./heads", TP: 6},
          says=f"{TP}: 64 attention heads do not divide by 6", next="Use a power of two"),
    wrong("tensor parallel size in words", job={**VLLM, "model.id": "./heads", TP: "four"},
          says="tensor_parallel_size must be a whole number", next="four"),
    wrong("tensor parallel size zero", job={**VLLM, "model.id": "./heads", TP: 0},
          says="tensor_parallel_size must be a whole number", next="at least 1"),
    wrong("replica larger than the machine", command="run", marks=[pytest.mark.ray],
          job={**VLLM, "model.id": "./heads", TP: 64},
          says="tensor_parallel_size x pipeline_parallel_size is 64, but this machine",
          next="Lower tensor_parallel_size"),
    wrong("unknown vLLM option", command="run", marks=[pytest.mark.engine, pytest.mark.ray],
          job={**VLLM, "model.id": "demo", "model.engine.max_num_sequences": 8},
          says=["model.engine", "max-num-sequences"], next="Did you mean `max_num_seqs`?"),
    wrong("no cluster to submit to", 1, command="submit",
          arguments=["job.yaml", "--address", NO_SERVER], env={"RAY_ADDRESS": "http://127.0.0.1:8"},
          says=f"Ray at {NO_SERVER}: Failed to connect to Ray at address: {NO_SERVER}",
          next="--address http://HOST:8265"),
]

SECRETS = [
    wrong("password in the input", job={"input.path": f"s3://me:{SECRET}@bucket/x"},
          says="input.path: holds credentials", next="use environment variables"),
    wrong("password in the output", job={"output.path": f"s3://me:{SECRET}@bucket/x"},
          says="output.path: holds credentials", next="use environment variables"),
    wrong("password in base_url",
          job={**HTTP, "model.base_url": f"http://me:{SECRET}@127.0.0.1:9/v1"},
          says="model.base_url: holds credentials", next="use environment variables"),
    wrong("password with a slash", job={"input.path": f"s3://AKIA:ab/{SECRET}@bucket/x"},
          says="input.path: holds credentials", next="use environment variables"),
    wrong("token in place of a user", job={**HTTP, "model.base_url": f"http://{SECRET}@h/v1"},
          says="model.base_url", next="environment variable"),
    wrong("signed address", job={"input.path": f"https://h/x.parquet?X-Amz-Signature={SECRET}"},
          says="input.path", next="environment variables"),
    wrong("key in the job file", job={"model.api_key": SECRET},
          says="model.api_key: unknown key", next="Did you mean `api_key_env`?"),
    wrong("key in place of its variable", job={"model.api_key_env": f"sk-{SECRET}"},
          says="model.api_key_env", next="environment variable"),
]

S3_STORAGE = [
    wrong("no credentials", 1, job={"input.path": "s3://bucket1/x"}, marks=NEEDS_S3,
          says="s3://bucket1/x: Unable to locate credentials", next="Set AWS_ACCESS_KEY_ID"),
    wrong("unknown key id", 1, job={"input.path": "s3://bucket1/x"}, marks=NEEDS_S3,
          env={**S3_KEYS, "AWS_ACCESS_KEY_ID": "nobody"},
          says="s3://bucket1/x: access denied", next="Check the credentials"),
    wrong("wrong secret", 1, job={"input.path": "s3://bucket1/x"}, marks=NEEDS_S3,
          env={**S3_KEYS, "AWS_SECRET_ACCESS_KEY": SECRET},
          says="s3://bucket1/x: access denied", next="Check the credentials"),
    wrong("no such bucket", job={"input.path": "s3://no-such-bucket/x"}, marks=NEEDS_S3,
          env=S3_KEYS,
          says="s3://no-such-bucket/x: no such file or folder", next="Check `input.path`"),
    wrong("no such bucket for the output", 1, command="run", marks=NEEDS_S3, env=S3_KEYS,
          job={"output.path": "s3://no-such-bucket/x"},
          says="s3://no-such-bucket/x", next="bucket"),
    wrong("no such profile", 1, job={"input.path": "s3://bucket1/x"},
          env={"AWS_PROFILE": "nope"},
          says="s3://bucket1/x: The config profile (nope) could not be found", next="AWS_PROFILE"),
    wrong("endpoint without scheme", 1, job={"input.path": "s3://bucket1/x"},
          env={**S3_KEYS, "AWS_ENDPOINT_URL": "127.0.0.1:9"},
          says="127.0.0.1:9", next="AWS_ENDPOINT_URL"),
    wrong("no bucket in the address", job={"input.path": "s3://"}, env=S3_KEYS,
          says="s3://: names no bucket", next="Give s3://BUCKET/PATH"),
]
# fmt: on


def ask(
    folder: Path,
    env: Mapping[str, str],
    command: str,
    arguments: Sequence[str],
    module: str = "pipeline.cli",
) -> subprocess.CompletedProcess[str]:
    """`axbatch COMMAND ARGUMENTS` in `folder`, with none of this machine's cloud settings."""
    foreign = ("AWS_", "HF_", "RAY_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    settings = {
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": NO_SERVER,
        "HF_HOME": str(folder / "hub"),
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", module, command, *arguments],
        cwd=folder, env={**kept, **settings, **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes | None]) -> None:
    for path, content in files.items():
        if content is None:
            (folder / path).mkdir(parents=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def job_text(changes: Mapping[str, Any]) -> bytes:
    job: dict[str, Any] = yaml.safe_load(yaml.safe_dump(JOB))
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        section = job
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is GONE:
            del section[leaf]
        else:
            section[leaf] = value
    return yaml.safe_dump(job).encode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the job has run."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder, {**FILES, "job.yaml": job_text({})})
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert ask(folder, here, "run", ["job.yaml"], "tests.faults.without_ray").returncode == 0
    return folder


@pytest.fixture
def answer(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[Mistake], subprocess.CompletedProcess[str]]:
    """Make the mistake in a folder of its own and run its command there."""

    def make(mistake: Mistake) -> subprocess.CompletedProcess[str]:
        if mistake.after_run:
            # The copies keep their times, which tell a changed input.
            shutil.copytree(request.getfixturevalue("finished"), tmp_path, dirs_exist_ok=True)
        else:
            write(tmp_path, FILES)
        text = job_text(mistake.job) if mistake.text is None else mistake.text
        write(tmp_path, {**mistake.files, "job.yaml": text})
        environment = dict(mistake.env)
        if request.node.get_closest_marker("s3"):
            request.getfixturevalue("s3_url")
            environment["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        return ask(tmp_path, environment, mistake.command, mistake.arguments or ["job.yaml"])

    return make


@pytest.mark.parametrize("mistake", [*JOB_FILE, *INPUT, *OUTPUT, *MODEL, *SECRETS, *S3_STORAGE])
def test_mistake_is_explained(
    mistake: Mistake, answer: Callable[[Mistake], subprocess.CompletedProcess[str]]
) -> None:
    done = answer(mistake)
    print(f"exit {done.returncode}\n{done.stderr}")  # pytest -rA shows the message
    everything = done.stdout + done.stderr
    assert "Traceback" not in everything
    assert "internal error" not in everything
    assert SECRET not in everything
    assert done.returncode == mistake.exit
    assert len(done.stderr.splitlines()) <= 3
    for what in (*mistake.says, mistake.next):
        assert what in done.stderr


# fmt: off
NO_MISTAKES = [
    pytest.param({}, id="the-job-itself"),
    pytest.param({"output.path": "heads/../out"}, id="through-a-parent-folder"),
    pytest.param({"input.path": "in/a.parquet", "output.path": "in/out"}, id="below-one-file"),
]
# fmt: on


@pytest.mark.parametrize("changes", NO_MISTAKES)
def test_no_mistake_is_no_error(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {**FILES, "job.yaml": job_text(changes)})
    done = ask(tmp_path, {}, "validate", ["job.yaml"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "valid; 2 rows in 1 file(s)" in done.stdout
