#!/usr/bin/env bash
# The clients that `cargo test clients` looks for, in target/clients: OpenAI's and lm-evaluation-harness (Python), Vercel's AI SDK (Node).
# A minute and 0.8 GB, of which OpenAI's client is 10 s.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=target/clients
python3 -m venv $folder && $folder/bin/pip install -q -U pip
$folder/bin/pip install -q --requirements-from-script tests/clients/openai_client.py
# Without torch: of transformers only tokenizers are used.
$folder/bin/pip install -q --no-compile "lm_eval[api]==0.4.13" transformers==5.24.0
npm install --silent --no-audit --no-fund --prefix $folder ai@6.0.325 @ai-sdk/openai-compatible@2.0.92 @ai-sdk/openai@3.0.141 zod@4.6.7
