"""What `--help` of the commands begins with, and what it leaves to `--help-all`."""

from __future__ import annotations

EXAMPLES = {
    "hosl-cloud": "hosl-cloud serve --bundle bundle/ --task sst2\nhosl-cloud merge latest --out trained/",
    "hosl-cloud init": "hosl-cloud init --name cloud.example.org --name 192.168.1.5",
    "hosl-cloud serve": (
        "hosl-cloud serve --bundle bundle/ --task sst2\n"
        "hosl-cloud serve --bundle bundle/ --config run.toml --host 0.0.0.0"
    ),
    "hosl-cloud device": "hosl-cloud device add kitchen",
    "hosl-cloud device add": "hosl-cloud device add kitchen",
    "hosl-cloud device list": "hosl-cloud device list",
    "hosl-cloud device revoke": "hosl-cloud device revoke kitchen",
    "hosl-cloud run": "hosl-cloud run list",
    "hosl-cloud run start": "hosl-cloud run start --bundle reviews --set rounds=200",
    "hosl-cloud run list": "hosl-cloud run list",
    "hosl-cloud run show": "hosl-cloud run show latest",
    "hosl-cloud run stop": "hosl-cloud run stop latest",
    "hosl-cloud run resume": "hosl-cloud run resume latest",
    "hosl-cloud run rm": "hosl-cloud run rm RUN",
    "hosl-cloud log": "hosl-cloud log latest --follow",
    "hosl-cloud checkpoint": "hosl-cloud checkpoint list latest",
    "hosl-cloud checkpoint list": "hosl-cloud checkpoint list latest",
    "hosl-cloud checkpoint export": "hosl-cloud checkpoint export latest --out tail.safetensors",
    "hosl-cloud cache": "hosl-cloud cache list",
    "hosl-cloud cache list": "hosl-cloud cache list",
    "hosl-cloud cache rm": "hosl-cloud cache rm kitchen",
    "hosl-cloud config": (
        "hosl-cloud config --example --data tickets.csv > run.toml\nhosl-cloud config --check run.toml --bundle bundle/"
    ),
    "hosl-cloud bundle": "hosl-cloud bundle list",
    "hosl-cloud bundle add": "hosl-cloud bundle add bundle/ --name reviews",
    "hosl-cloud bundle list": "hosl-cloud bundle list",
    "hosl-cloud bundle rm": "hosl-cloud bundle rm reviews",
    "hosl-cloud drain": "hosl-cloud drain",
    "hosl-cloud merge": "hosl-cloud merge latest --out trained/\nhosl-cloud merge latest --gguf trained.gguf",
    "hosl-cloud try": 'hosl-cloud try latest "the screen stays black"\nhosl-cloud try latest - < questions.txt',
    "hosl-cloud simulate": (
        "hosl-cloud simulate --bundle bundle/ --task sst2 --devices 100 \\\n"
        "                    --data train.jsonl --eval validation.jsonl"
    ),
    "hosl-cloud unit": "hosl-cloud unit | sudo tee /etc/systemd/system/hosl-cloud.service",
}
"""By the command's whole name."""

RARE = frozenset(
    {
        *("--log-level", "--log-format", "--debug", "--rank-timeout-s", "--drain-s", "--bundles"),
        *("--baseline", "--threads", "--skip-broken", "--csv", "--ca", "--admin-token-file"),
    }
)
"""Options that few people need."""
