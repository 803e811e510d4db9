"""Tasks of lm-evaluation-harness through our engine, against the harness's own model class on the same directory."""

import json

import pytest

pytest.importorskip("lm_eval")

from cairn.errors import NotFoundError
from cairn.evaluation.engine import Engine
from cairn.evaluation.measure import evaluate

BLIMP = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""
GSM = """
task: local_gsm
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs: {{until: ["Q", "\\n\\n"], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tasks(real_data, corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("passive_1", "causative"):
        (folder / f"{name}.yaml").write_text(BLIMP.format(name=name, file=real_data / "blimp" / f"{name}.jsonl"))
    (folder / "gsm.yaml").write_text(GSM.format(file=real_data / "gsm8k" / "test.jsonl"))
    (folder / "rolling.yaml").write_text(ROLLING.format(file=corpus_file))
    return folder


@pytest.fixture(scope="module")
def theirs(small_run):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(small_run.newest().path), device="cpu", batch_size=4, dtype="float32")


NAMES = ["local_passive_1", "local_causative", "local_gsm", "local_rolling"]


def test_scores_are_those_of_the_harness_itself(small_run, theirs, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours = evaluate(small_run.newest(), [{"name": "harness", "tasks": NAMES, "include": str(tasks), "limit": 25}], store=False)
    expected = simple_evaluate(theirs, tasks=NAMES, limit=25, task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0)[
        "results"
    ]
    found = {(row.task, row.metric): row.value for row in ours}
    assert {task for task, _ in found} == set(NAMES)
    for (task, metric), value in found.items():
        assert value == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
    assert all(row.n == 25 for row in ours)


def test_answers_are_those_of_the_harness_request_by_request(small_run, theirs, real_data):
    from lm_eval.api.instance import Instance

    from cairn.evaluation.harness import HarnessModel

    rows = [json.loads(line) for line in (real_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:6]]
    mine = HarnessModel(Engine(small_run.newest().model(), small_run.newest().tokenizer))
    pairs = [
        ("", "a stone"),
        ("on the trail ", "marks"),
        *((f"Q: {row['question']}\nA:", f" {answer}") for row in rows for answer in (3, 18, row["answer"][:20])),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    a, b = mine.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-3) and [x for _, x in a] == [x for _, x in b]
    options = {"until": ["\n", "e "], "max_gen_toks": 10, "do_sample": False}
    asked = [Instance("generate_until", {}, (context, dict(options)), i) for i, (context, _) in enumerate(pairs[1:])]
    assert mine.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    asked = [Instance("loglikelihood_rolling", {}, (row["question"],), i) for i, row in enumerate(rows)]
    assert mine.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5)


def test_a_task_that_there_is_not_is_named(small_run, tasks, monkeypatch):
    import lm_eval.tasks

    theirs = lm_eval.tasks.TaskManager  # without the thousands of tasks that it knows, which take long to look through
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults=False: theirs(include_path=include_path, include_defaults=False))
    with pytest.raises(NotFoundError, match="Did you mean 'local_passive_1'"):
        evaluate(small_run.newest(), [{"name": "harness", "tasks": ["local_pasive_1"], "include": str(tasks)}], store=False)
    with pytest.raises(NotFoundError, match="no folder"):
        evaluate(small_run.newest(), [{"name": "harness", "tasks": ["x"], "include": str(tasks / "nowhere")}], store=False)
