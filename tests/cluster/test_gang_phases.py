"""A rank is killed in every phase of a round: the training goes on to the same bits."""

from pathlib import Path

import pytest

FAULTS = Path(__file__).parent.parent / "support" / "faults"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MIDDLE = 60
STRIKES = [
    "1 join before 0",
    "0 join after 0",
    "1 memory before 0",
    "0 start after 0",
    f"1 weights before {MIDDLE}",
    f"0 weights during {MIDDLE}",
    f"1 weights after {MIDDLE}",  # which is in the gradient
    f"0 gradient before {MIDDLE}",
    f"1 gradient during {MIDDLE}",
    f"0 gradient after {MIDDLE}",  # in the sum
    f"1 clipping-sums before {MIDDLE}",
    f"0 clipping-sums during {MIDDLE}",
    f"1 clipping-sums after {MIDDLE}",  # in the update
    "0 done before 0",
    "1 done after 0",  # in the commit
]
# Of these the ranks exchange the gradient in buckets: a strike at step 60 hits the first exchange.
EARLY_STRIKES = [
    f"1 weights after {MIDDLE}",
    f"0 gradient before {MIDDLE}",
    f"1 gradient during {MIDDLE}",
    f"0 gradient after {MIDDLE}",
]

CLUSTER = """
    import json, logging, os, time
    from spark_app import *

    ORDER, STEPS, result = os.environ["TFSPARK_ORDER"], 90, dict()
    logs = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("tfspark").addHandler(handler)

    with application("local-cluster[2,1,1024]") as sc:
        for strike, buckets in RUNS:
            del logs[:]
            model, training = optimizer(
                sc, "dense", engine="gang", clip_norm=0.5, gradient_buckets=buckets
            )
            training.optimize(MaxIteration(1))
            if strike:
                with open(ORDER, "w") as order:
                    order.write(strike)
            started = time.monotonic()
            training.optimize(MaxIteration(STEPS))
            num_buckets = len(training._training.loop.run.layout.buckets)
            result[str((strike, buckets))] = dict(
                num_buckets=num_buckets,
                digest=digest(model), obeyed=not os.path.exists(ORDER), logs=list(logs),
                seconds=time.monotonic() - started,
            )
            training.close()
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results(application, tmp_path_factory):
    order = str(tmp_path_factory.mktemp("order") / "order")
    runs = [(strike, 1) for strike in (None, *STRIKES)]
    runs += [(strike, 4) for strike in (None, *EARLY_STRIKES)]
    source = CLUSTER.replace("RUNS", repr(runs))
    return application(source, path=[FAULTS], TFSPARK_ORDER=order)


@pytest.mark.parametrize(
    "strike, buckets",
    [*((strike, 1) for strike in STRIKES), *((strike, 4) for strike in EARLY_STRIKES)],
)
def test_a_rank_that_dies_costs_a_round_and_no_bit(results, strike, buckets):
    found = results[str((strike, buckets))]
    assert found["num_buckets"] == {1: 1, 4: 2}[buckets]
    assert found["obeyed"], "nobody was there to be killed"
    assert found["digest"] == results[str((None, buckets))]["digest"]
    assert found["seconds"] < 60
    # A rank that dies after it was done has perhaps been computed anew by Spark, without a word.
    if "done" not in strike:
        assert any("RETRY" in line for line in found["logs"])


@pytest.mark.parametrize("buckets", [1, 4])
def test_the_undisturbed_run_is_undisturbed(results, buckets):
    assert results[str((None, buckets))]["logs"] == []
