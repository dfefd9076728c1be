# The image of the CronJob's container: Python, the libraries, the script, and nothing that could
# install more. The whole of it is read at run time and never written.
#
# Python 3.13 gets security fixes until October 2029, and the tests run on it. The tag names a
# version, not a build, so that rebuilding brings the fixes of Python and Debian. For the same
# bits every time, pin the digest as well, in both places, and let a bot move it:
#   FROM python:3.13-slim@sha256:...
FROM python:3.13-slim AS build

# --require-hashes: only the files that requirements.txt knows. --only-binary: no package runs
# code of its own here. --no-deps: requirements.txt is complete.
COPY --chmod=0644 requirements.txt /tmp/
RUN pip install --require-hashes --only-binary=:all: --no-deps --no-compile --no-cache-dir \
    --root-user-action=ignore --requirement /tmp/requirements.txt

WORKDIR /usr/local/lib/python3.13/site-packages

# What no run imports (tests/test_image.py runs the script without it):
# - the asynchronous half of the Kubernetes client, and the packages that serve only it;
# - a module for every API group and every kind: the script sends and reads plain JSON;
# - the libraries' own tests, type stubs and interface definitions;
# - pip, with which nobody should be able to install anything.
RUN rm -r kubernetes/aio kubernetes/client/api \
    && find kubernetes/client/models -name '*.py' ! -name __init__.py -delete \
    && find . \( -name '*_test.py' -o -name '*.pyi' -o -name '*.proto' \) -delete \
    && pip uninstall --yes --root-user-action=ignore aiohappyeyeballs aiohttp aiohttp-retry \
    aiosignal attrs frozenlist multidict propcache yarl pip \
    && find . -name __pycache__ -prune -exec rm -r {} +

# Byte-code for everything, as nothing can be written at run time, and Python's own library comes
# without any. It is not checked against its source at each import (unchecked): both are in an
# immutable layer.
COPY --chmod=0644 scaler.py /app/
RUN python -m compileall -q --invalidation-mode unchecked-hash . /app


FROM python:3.13-slim

# No .pyc from the commands below, and no attempts at any in a run.
ENV PYTHONDONTWRITEBYTECODE=1
RUN pip uninstall --yes --root-user-action=ignore pip \
    && rm -rf /usr/local/lib/python3.13/ensurepip \
    && python -m compileall -q --invalidation-mode unchecked-hash \
    -x '/(idlelib|pydoc_data|site-packages|tkinter|turtledemo)/' /usr/local/lib/python3.13

COPY --from=build /usr/local/lib/python3.13/site-packages /usr/local/lib/python3.13/site-packages
COPY --from=build /app /app

# The base brings the time zones that SCHEDULED_MIN_REPLICAS names. A base without them fails here.
RUN python -c "import zoneinfo; zoneinfo.ZoneInfo('Asia/Seoul')"

LABEL org.opencontainers.image.title="queue-scaler" \
      org.opencontainers.image.description="Scales a Deployment by a Firestore job queue" \
      org.opencontainers.image.licenses="Apache-2.0"

# "nobody" is often taken for other things; this number is nobody's. A number, because Kubernetes
# cannot tell from a name whether it is root (runAsNonRoot).
USER 65532:65532
WORKDIR /app

# -m rather than the file's name, which would recompile the script each time.
ENTRYPOINT ["python", "-m", "scaler"]
