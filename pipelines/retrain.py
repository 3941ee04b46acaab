"""The stages of dvc.yaml as a Kubeflow pipeline, for retraining: it declares, and computes nothing.

Each component is one call of the stage's command on the paths of its artifacts, which are called like the command's
options, since the pods of a cluster share no folder. What dvc.yaml takes from params.yaml comes from ``plan`` here.
There are no conditions: `kfp.local` gets them wrong without a word, so a stage that says no ends with an error.

KFP copies each function's source into the compiled pipeline: it stands alone, and imports inside.
"""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output


def plan(
    params: str, as_of: str, data_start_date: str, data_end_date: str, model_name: str, trigger_id: str, job_id: str
) -> str:
    from closedloop.component import plan_run

    return plan_run(params, as_of, data_start_date, data_end_date, model_name, trigger_id or job_id)


def ingest(run: str, raw: Output[Dataset], metrics: Output[Artifact]) -> None:
    from closedloop.component import run_stage

    run_stage("ingest", locals())


def validate(
    run: str, raw: Input[Dataset], docs: Output[Artifact], page: Output[Artifact], metrics: Output[Artifact]
) -> None:
    from closedloop.component import run_stage

    run_stage("validate", locals())


def features(
    run: str, raw: Input[Dataset], data_quality: Input[Artifact], rollup: Output[Dataset], features: Output[Dataset]
) -> None:
    from closedloop.component import run_stage

    run_stage("features", locals())


def training_set(
    run: str,
    raw: Input[Dataset],
    rollup: Input[Dataset],
    features: Input[Dataset],
    training: Output[Dataset],
    metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("training-set", locals())


def train(
    run: str,
    training: Input[Dataset],
    data_quality: Input[Artifact],
    model: Output[Model],
    pipeline: Output[Model],
    figures: Output[Artifact],
    plots: Output[Artifact],
    run_file: Output[Artifact],
    metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("train", locals())


def evaluate(
    run: str,
    raw: Input[Dataset],
    training: Input[Dataset],
    model: Input[Model],
    pipeline: Input[Model],
    figures: Output[Artifact],
    plots: Output[Artifact],
    card: Output[Artifact],
    gates: Output[Artifact],
    metrics: Output[Artifact],
) -> None:
    from closedloop.component import run_stage

    run_stage("evaluate", locals())


def register(
    run: str, model: Input[Model], gates: Input[Artifact], run_file: Input[Artifact], registration: Output[Artifact]
) -> None:
    from closedloop.component import run_stage

    run_stage("register", locals())


def package(run: str, registration: Input[Artifact], bento: Output[Artifact], metrics: Output[Artifact]) -> None:
    from closedloop.component import run_stage

    run_stage("package", locals())


def build_pipeline(base_image: str, environment: dict[str, str], secret: str, secret_keys: tuple[str, ...]):
    """The pipeline with these components, in this image.

    Parameters
    ----------
    environment
        Variables of every pod: which profile, where its stores are.
    secret
        A Kubernetes Secret whose ``secret_keys`` become variables of every pod; empty: none.
    """

    def place(stage, **inputs):
        component = dsl.component(stage, base_image=base_image, packages_to_install=[], install_kfp_package=False)
        task = component(**inputs).set_caching_options(False)  # what a source holds is known only by asking
        for name, value in environment.items():
            task.set_env_variable(name, value)
        if secret:
            names = [{"secretKey": key, "envVar": key} for key in secret_keys]
            task.platform_config["kubernetes"] = {"secretAsEnv": [{"secretName": secret, "keyToEnv": names}]}
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
        raw = place(ingest, run=run)["raw"]
        quality = place(validate, run=run, raw=raw)["metrics"]
        made = place(features, run=run, raw=raw, data_quality=quality)
        training = place(training_set, run=run, raw=raw, **made)["training"]
        trained = place(train, run=run, training=training, data_quality=quality)
        model = {"run": run, "model": trained["model"]}
        judged = place(evaluate, **model, raw=raw, training=training, pipeline=trained["pipeline"])
        registered = place(register, **model, gates=judged["gates"], run_file=trained["run_file"])
        place(package, run=run, registration=registered["registration"])

    return retrain
