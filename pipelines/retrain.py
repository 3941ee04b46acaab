"""The stages of dvc.yaml as a Kubeflow pipeline, for retraining: it declares, and computes nothing.

Each component is one call of the stage's command on the paths of its artifacts, since the pods of a cluster share no
folder. Artifacts are called as in `closedloop.config.layout.Layout`. What dvc.yaml takes from params.yaml comes from
``plan`` here.
There are no conditions: `kfp.local` gets them wrong without a word, so a stage that says no ends with an error.

KFP copies each function's source into the compiled pipeline: it stands alone, and imports inside.
"""

import inspect

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output


def plan(
    params: str, as_of: str, data_start_date: str, data_end_date: str, model_name: str, trigger_id: str, job_id: str
) -> str:
    from closedloop.component import plan_run

    return plan_run(params, as_of, data_start_date, data_end_date, model_name, trigger_id or job_id)


def ingest(run: str, raw: Output[Dataset], ingest_metrics: Output[Artifact]) -> None:
    from closedloop.component import run_stage

    run_stage("ingest", locals())


def validate(
    run: str,
    raw: Input[Dataset],
    data_docs: Output[Artifact],
    data_quality_page: Output[Artifact],
    data_quality: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("validate", locals())


def features(
    run: str, raw: Input[Dataset], data_quality: Input[Artifact], daily: Output[Dataset], features: Output[Dataset]
) -> None:
    from closedloop.component import run_stage

    run_stage("features", locals())


def training_set(
    run: str,
    raw: Input[Dataset],
    daily: Input[Dataset],
    features: Input[Dataset],
    training: Output[Dataset],
    training_set_metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("training-set", locals())


def train(
    run: str,
    training: Input[Dataset],
    data_quality: Input[Artifact],
    model: Output[Model],
    pipeline: Output[Model],
    run_file: Output[Artifact],
    train_figures: Output[Artifact],
    train_plots: Output[Artifact],
    train_metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("train", locals())


def evaluate(
    run: str,
    raw: Input[Dataset],
    training: Input[Dataset],
    model: Input[Model],
    pipeline: Input[Model],
    train_plots: Input[Artifact],
    gates: Output[Artifact],
    card: Output[Artifact],
    test_figures: Output[Artifact],
    test_plots: Output[Artifact],
    eval_metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("evaluate", locals())


def register(
    run: str, model: Input[Model], gates: Input[Artifact], run_file: Input[Artifact], registration: Output[Artifact]
) -> None:
    from closedloop.component import run_stage

    run_stage("register", locals())


def package(
    run: str, registration: Input[Artifact], bento: Output[Artifact], package_metrics: Output[Artifact]
) -> None:
    from closedloop.component import run_stage

    run_stage("package", locals())


STAGES = (ingest, validate, features, training_set, train, evaluate, register, package)


def build_pipeline(settings):
    """The pipeline with these components; ``settings`` say what every pod runs, is given and requests.

    Parameters
    ----------
    settings
        `closedloop.config.settings.RetrainingSettings`.
    """

    def place(stage, **inputs):
        component = dsl.component(
            stage, base_image=settings.base_image, packages_to_install=[], install_kfp_package=False
        )
        task = component(**inputs).set_caching_options(False)  # what a source holds is known only by asking
        for name, value in settings.environment.items():
            task.set_env_variable(name, value)
        if settings.cpu_request:
            task.set_cpu_request(settings.cpu_request)
        if settings.memory_request:
            task.set_memory_request(settings.memory_request)
        if settings.secret:
            names = [{"secretKey": key, "envVar": key} for key in settings.secret_keys]
            task.platform_config["kubernetes"] = {"secretAsEnv": [{"secretName": settings.secret, "keyToEnv": names}]}
        return task.outputs

    @dsl.pipeline(name="closedloop-retrain")
    def retrain(
        params: str = "",
        as_of: str = "",
        data_start_date: str = "",
        data_end_date: str = "",
        model_name: str = "",
        trigger_id: str = "",
    ) -> None:
        dates = {"as_of": as_of, "data_start_date": data_start_date, "data_end_date": data_end_date}
        names = {"model_name": model_name, "trigger_id": trigger_id, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        run = place(plan, params=params, **dates, **names)["Output"]
        made = {}
        for stage in STAGES:  # each takes what earlier ones made under the same name
            inputs = {name: made[name] for name in inspect.signature(stage).parameters if name in made}
            made |= place(stage, run=run, **inputs)

    return retrain
