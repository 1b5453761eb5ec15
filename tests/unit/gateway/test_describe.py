"""What `check` says of settings: where calls may go, licences, notes, oversights."""

from __future__ import annotations

from freehold.gateway.describe import describe, warnings
from tests.routing import EXPERIMENT, TOML, settings


def test_everything_that_an_auditor_asks_is_said() -> None:
    text = "\n".join(describe(settings(EXPERIMENT, "[gateway]\nair_gapped = true\n" + TOML)))
    for line in (
        "upstream house: http://10.0.0.5:8000/v1 (vllm; local); provider ourselves; ",
        "; region eu-west-1; classes of data: personal, secret",
        "  model glm-5.2: licence MIT; USD/Mtok input 0.5, cached input 0.1, output 2",
        "upstream cloud: https://api.example.com/v1 (api; a name, which may be local or not); provider example",
        "  note: Keeps prompts for 30 days.",
        "  model big: licence not given; USD/Mtok input 3, output 15",
        "model assistant: only 100% (house: glm-5.2); then api, cheap",
        "model split: now 95% → 75% → 50% → 0% (house: glm-5.2), next 5% → 25% → 50% → 100% (house: glm-5.2-int4);",
        "  experiment int4: next against now, 5% → 25% → 50% → 100%, sticky by conversation",
        "data class personal: may go to house, small; models assistant, cheap, split",
        "data class secret: may go to house; models assistant, split",
        "air-gapped: only private and loopback addresses are called",
    ):
        assert line in text


def test_arms_have_the_share_that_the_experiment_gives_them_of_what_their_weights_have_together() -> None:
    more = EXPERIMENT.replace(
        'model = "glm-5.2-int4" },', 'model = "glm-5.2-int4", weight = 0 },\n  '
        '{ name = "rest", upstream = "small", model = "tiny", weight = 3 },'
    ) + "steps = [0.001, 0.5]\naa_units = 2000\n"  # fmt: skip
    text = "\n".join(describe(settings(more)))
    assert "now 24.98% → 12.5% (house: glm-5.2), next 0.025% → 12.5% (house: glm-5.2-int4), rest 75% (small" in text
    assert "next against now, A/A for 2,000 units, 0.1% → 50%, sticky by conversation" in text
    without = more.partition("[experiments")[0]
    assert "now 25% (house: glm-5.2), next 0% (house: glm-5.2-int4), rest 75%" in "\n".join(describe(settings(without)))


def test_a_budget_needs_limits_that_models_can_take() -> None:
    def warned(more: str) -> list[str]:
        return [each for each in warnings(settings(more)) if "max_output_tokens" in each]

    assert warned("") == []
    assert len(warned("[teams.t]\nbudget_per_day = 1.0\n")) == 3
    key = f'[keys.k]\nsha256 = "{"0" * 64}"\nbudget_per_day = 1.0\n'
    (first, *_) = warned(key)
    assert "models.assistant" in first
    assert "32,768" in first
    limited = TOML.replace("[models.api]", "[models.api]\nmax_output_tokens = 32768")
    assert [each for each in warnings(settings(key, limited)) if "models.api:" in each] == []


def test_oversights_are_warned_of() -> None:
    more = """
    [upstreams.far]
    url = "http://203.0.113.9/v1"
    models = { m = {} }
    metrics = true
    [keys.k]
    sha256 = "%s"
    data_class = "medical"
    [[routes]]
    name = "all"
    effort = "low"
    [[routes]]
    name = "never"
    when = { model = ["api"], task = ["tag"] }
    to = "cheap"
    """ % ("0" * 64)
    found = warnings(settings(more))
    for warning in (
        "upstreams.far.models.m: no licence is noted",
        "upstreams.far.models.m: an API without prices costs nothing in budgets and the ledger",
        "upstreams.far.models.m: no alias uses it",
        "upstreams.far: it is outside of this network, and no region is given",
        "upstreams.far: it is outside of this network, and passes for our own; give its provider",
        "upstreams.far: prompts and its key go out over http:// unencrypted",
        "upstreams.far: metrics need an engine; those of an API are not known",
        "data class 'medical' may go nowhere: requests that name it are refused",
        "routes 'never': an earlier rule without a condition always comes first",
    ):
        assert warning in found
    assert not [warning for warning in found if "house" in warning and "glm-5.2:" in warning]


def test_good_settings_have_no_warning() -> None:
    base = TOML.replace('.models.big]', '.models.big]\nlicence = "terms"').replace(
        ".models.tiny]", '.models.tiny]\nlicence = "MIT"'
    )  # fmt: skip
    assert warnings(settings(EXPERIMENT, base)) == []
