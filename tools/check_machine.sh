#!/bin/sh
# Ends with one line that says what to install where Python or Java is missing or too old.

python=${PYTHON:-python3}

fail() {
    echo "tfspark: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "Python 3.10 or later is needed, and '$python' was not found. Install it from python.org or your package manager, or name one: make PYTHON=/path/to/python3"

found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "Python 3.10 or later is needed, and '$python' is ${found:-not working}. Install a newer one, or name one: make PYTHON=/path/to/python3"

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is needed, and '$python' lacks it. Install it (on Debian and Ubuntu: apt install python3-venv)"

if [ -n "$JAVA_HOME" ]; then
    java=$JAVA_HOME/bin/java where="in JAVA_HOME ($JAVA_HOME)"
else
    java=java where="on the PATH"
fi
install="Install a JDK or JRE 17 or later (on Debian and Ubuntu: apt install openjdk-17-jre-headless), or set JAVA_HOME"

command -v "$java" >/dev/null 2>&1 ||
    fail "Java 17 or later is needed, and none was found $where. $install"

# 'openjdk version "17.0.15" 2025-04-15', or '"1.8.0_412"' up to Java 8; options of the
# environment may print a line of their own before it.
version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9][^"]*\)".*/\1/p' | head -n 1)
major=${version#1.}
major=${major%%[!0-9]*}
[ -n "$major" ] ||
    fail "Java 17 or later is needed, and '$java -version' names no version. $install"
[ "$major" -ge 17 ] ||
    fail "Java 17 or later is needed, and the one $where is $version. $install"
