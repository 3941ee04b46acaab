"""Servers that `benchmarks/serving.py` compares with the service: ``python servers.py NAME FOLDER PORT``.

Each takes the features as one JSON object and answers with prediction and probability.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MODEL, CONTRACT = "model.onnx", "contract.json"


def build_tutorial(folder: Path) -> Any:
    """FastAPI and joblib, as most tutorials show it."""
    import joblib
    import pandas as pd
    from fastapi import FastAPI
    from pydantic import create_model

    described = json.loads((folder / CONTRACT).read_bytes())["features"]
    kinds: dict[str, Any] = {"numeric": float | None, "categorical": str | None}
    row_type: Any = create_model("Row", **{feature["name"]: (kinds[feature["kind"]], ...) for feature in described})
    pipeline = joblib.load(folder / "pipeline.joblib")
    app = FastAPI()

    async def predict(row: Any) -> dict[str, float]:
        frame = pd.DataFrame([row.model_dump()])
        prediction = int(pipeline.predict(frame)[0])
        return {"prediction": prediction, "probability": float(pipeline.predict_proba(frame)[0, 1])}

    predict.__annotations__["row"] = row_type
    app.post("/predict")(predict)
    return app


def build_bare(folder: Path) -> Any:
    """One ASGI route with msgspec and ONNX Runtime: no checks, no log, no metrics."""
    import msgspec
    import numpy as np
    import onnxruntime

    described = json.loads((folder / CONTRACT).read_bytes())["features"]
    codes = [
        {name: code for code, name in enumerate(feature["categories"])} if feature["kind"] == "categorical" else None
        for feature in described
    ]
    names = [feature["name"] for feature in described]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    decode, encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
    missing = float("nan")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        message = await receive()
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        row = decode(body)
        packed = [
            (missing if row[name] is None else row[name]) if known is None else known.get(row[name], -1)
            for name, known in zip(names, codes, strict=True)
        ]
        score = float(session.run(["probability"], {"features": np.array([packed], dtype=np.float32)})[0][0])
        answer = encode({"prediction": int(score >= 0.5), "probability": score})
        await respond(send, answer)

    return app


def build_constant(_: Path) -> Any:
    """What uvicorn itself can do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await respond(send, b'{"prediction":0,"probability":0.5}')

    return app


async def respond(send: Any, body: bytes) -> None:
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    import uvicorn

    name, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    app = {"tutorial": build_tutorial, "bare": build_bare, "constant": build_constant}[name](folder)
    tuned: dict[str, Any] = {"access_log": False, "server_header": False, "date_header": False, "proxy_headers": False}
    uvicorn.run(app, port=port, log_level="warning", **({} if name == "tutorial" else tuned))


if __name__ == "__main__":
    main()
