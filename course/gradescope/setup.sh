#!/usr/bin/env bash
# Gradescope runs this once, when the image is built; a CPU build of torch keeps it small.
set -euo pipefail
cd /autograder/source/repository
apt-get update && apt-get install -y python3.11 python3.11-venv
python3.11 -m venv /opt/course
/opt/course/bin/pip install --quiet torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
/opt/course/bin/pip install --quiet -r requirements.txt
