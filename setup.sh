#!/usr/bin/env bash
# Keeps .venv, right beside this file, equal to requirements.lock. Sourced by ratchet.sh and test.sh:
#
#     source setup.sh
#     ensure_environment || exit    # then use .venv/bin/python
#
# Exit codes: 0 ready; 2 it cannot be made, and one line on stderr says what is missing and what to do; a signal's own
# when interrupted. Everything goes to stderr; what the installer said is kept in .venv/install.log.
#
# There is one rule: a copy of the lock file, put into .venv as the very last step, says that .venv is complete. While
# it equals requirements.lock nothing is done; otherwise .venv is made anew, because what a killed installer leaves
# behind looks installed and is not. What was downloaded before comes out of the installer's own cache.

_SETUP_DIR=${BASH_SOURCE[0]%/*}
[[ $_SETUP_DIR != "${BASH_SOURCE[0]}" ]] || _SETUP_DIR=.
[[ $_SETUP_DIR == /* ]] || _SETUP_DIR=$PWD/$_SETUP_DIR
_SETUP_DIR=${_SETUP_DIR%/.}

_SETUP_LOCK=$_SETUP_DIR/requirements.lock
_SETUP_VENV=$_SETUP_DIR/.venv
_SETUP_STAMP=$_SETUP_VENV/installed.lock
_SETUP_LOG=$_SETUP_VENV/install.log

# What the locked packages have builds for: raise these with the lock file.
_SETUP_PYTHON_OLDEST=11 # of Python 3
_SETUP_PYTHON_NEWEST=14
_SETUP_GLIBC_OLDEST=31 # of glibc 2
_SETUP_SPACE_MB=3000   # .venv takes 1.8 GB, the downloads on their way another 0.5 GB

ensure_environment() {
  # Another Python's settings would leak into ours, here and in whatever the caller runs next.
  unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
  _setup_is_current || (_setup_install)
}

# Runs at every start, so it starts no other program.
_setup_is_current() {
  [[ -f $_SETUP_STAMP && -f $_SETUP_LOCK && -x $_SETUP_VENV/bin/python ]] &&
    [[ "$(<"$_SETUP_LOCK")" == "$(<"$_SETUP_STAMP")" ]]
}

# --- the slow path, in a subshell: what it sets and traps does not reach the caller ----------------------------------

_setup_install() {
  set +ef
  shopt -s nullglob
  IFS=$' \t\n'
  local installer=pip uv python='' child='' code=0 next_line=0 packages=0 preinstalled=0
  SECONDS=0
  uv=$(type -P uv) && installer=uv
  _setup_check_machine
  _setup_find_python
  _setup_claim_folder
  _setup_is_current && return # another process has made it in the meantime

  rm -f -- "$_SETUP_STAMP" # first, so that from here on nobody takes .venv for complete
  _setup_empty || _setup_fail "cannot remove what is in $_SETUP_VENV: remove it yourself, then run this again"
  : >"$_SETUP_LOG"
  _setup_check_space
  _setup_count_packages
  trap '_setup_interrupted INT' INT
  trap '_setup_interrupted TERM' TERM
  trap '_setup_interrupted HUP' HUP
  _setup_say "installing $packages packages into $_SETUP_VENV (once; about a minute, and 0.5 GB to download)"
  if ! { _setup_make_venv && _setup_fill_venv && _setup_stamp; }; then _setup_diagnose; fi
  _setup_say "ready after $SECONDS s"
}

_setup_check_machine() {
  local glibc
  [[ -f $_SETUP_LOCK ]] || _setup_fail "$_SETUP_LOCK is missing: restore it with 'git checkout requirements.lock'"
  [[ "$(uname -sm)" == 'Linux x86_64' ]] ||
    _setup_fail "needs Linux on x86-64, the only system that the TPU compiler is built for; this is $(uname -sm)"
  glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) # 'glibc 2.36', or nothing where the C library is another one
  if [[ $glibc != 'glibc 2.'* ]] || ((${glibc#glibc 2.} < _SETUP_GLIBC_OLDEST)); then
    _setup_fail "needs glibc 2.$_SETUP_GLIBC_OLDEST or newer, for the TPU compiler (Debian 11, Ubuntu 20.04 have it);" \
      "this system has ${glibc:-another C library}: use a newer one"
  fi
}

# Sets python to the first suitable one on PATH. With uv it may stay empty: uv then fetches a Python of its own.
_setup_find_python() {
  local minor candidate verdict version path found='' bare='' names=(python3) probe='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
in_range = (3, int(sys.argv[1])) <= sys.version_info[:2] <= (3, int(sys.argv[2]))
verdict = "suitable" if in_range and sys.implementation.name == "cpython" and not sys.abiflags else "unsuitable"
try:
    import ensurepip, venv
except ImportError:
    if verdict == "suitable" and sys.argv[3] == "pip":
        verdict = "bare"
print("\t".join((verdict, version, getattr(sys, "_base_executable", None) or sys.executable)))'
  for ((minor = _SETUP_PYTHON_NEWEST; minor >= _SETUP_PYTHON_OLDEST; minor--)); do names+=("python3.$minor"); done
  while read -r candidate; do
    # A version manager's stub fails here, and so does the python of a .venv that was half made.
    IFS=$'\t' read -r verdict version path < <(
      "$candidate" -I -c "$probe" "$_SETUP_PYTHON_OLDEST" "$_SETUP_PYTHON_NEWEST" "$installer" 2>/dev/null </dev/null
    ) || continue
    case $verdict in
      suitable) python=$path && return ;;
      bare) bare=${bare:-${version%.*}} ;;
      *) [[ ", $found," == *", $version,"* ]] || found+="${found:+, }$version" ;;
    esac
  done < <(type -aP "${names[@]}")
  [[ -z $uv ]] || return
  [[ -z $bare ]] ||
    _setup_fail "Python $bare lacks its venv module: install it (Debian, Ubuntu: apt install python$bare-venv)," \
      "then run this again"
  _setup_fail "needs Python 3.$_SETUP_PYTHON_OLDEST to 3.$_SETUP_PYTHON_NEWEST, found ${found:-none} on PATH:" \
    "install one (Debian 12, Ubuntu 24.04: apt install python3 python3-venv), or uv, which fetches its own"
}

# Makes .venv and locks it. The lock is on the folder itself, which is emptied but never removed. The installer inherits
# it: when this shell is killed and the installer is not, the next caller waits for that too.
_setup_claim_folder() {
  local lock_fd
  { mkdir -p -- "$_SETUP_VENV" && : >>"$_SETUP_LOG"; } 2>/dev/null ||
    _setup_fail "cannot write to $_SETUP_VENV: make the folder writable for you, or work in a copy of your own"
  type -P flock >/dev/null && exec {lock_fd}<"$_SETUP_VENV" || return
  while true; do
    flock -n "$lock_fd" 2>/dev/null
    (($? == 1)) || return # ours, or this filesystem has no locks
    _setup_progress "another process is installing, waiting for it"
    sleep 0.3
  done
}

# Leaves the log, and fails when something could not be removed.
_setup_empty() {
  local entry
  for entry in "$_SETUP_VENV"/* "$_SETUP_VENV"/.[!.]*; do
    [[ $entry == "$_SETUP_LOG" ]] || rm -rf -- "$entry" 2>>"$_SETUP_LOG" || return
  done
}

_setup_free_mb() {
  df -Pk -- "$_SETUP_VENV" 2>/dev/null | { read -r _ && read -r _ _ _ free _ && echo $((free * 1024 / 1000000)); }
}

_setup_check_space() {
  local free
  free=$(_setup_free_mb)
  ((${free:-$_SETUP_SPACE_MB} >= _SETUP_SPACE_MB)) ||
    _setup_fail "needs $_SETUP_SPACE_MB MB free for $_SETUP_VENV, there are $free: free some (.venv may be a link to" \
      "a folder on another disk), then run this again"
}

_setup_count_packages() {
  local line
  while read -r line; do
    case $line in
      *"sys_platform == 'win32'"* | *'python_full_version == '*) ;; # not for everybody
      [a-zA-Z0-9]*==*) packages=$((packages + 1)) ;;
    esac
  done <"$_SETUP_LOCK"
}

_setup_make_venv() {
  mkdir -- "$_SETUP_VENV/tmp" 2>>"$_SETUP_LOG" || return
  export TMPDIR=$_SETUP_VENV/tmp # on the filesystem whose space was checked
  if [[ -n $uv ]]; then
    _setup_run "$uv" --color never venv --no-project --allow-existing \
      --python "${python:->=3.$_SETUP_PYTHON_OLDEST,<3.$((_SETUP_PYTHON_NEWEST + 1))}" "$_SETUP_VENV"
  else
    _setup_run "$python" -I -m venv "$_SETUP_VENV"
  fi || return
  local present=("$_SETUP_VENV"/lib/python3.*/site-packages/*.dist-info)
  preinstalled=${#present[@]}
}

# The lock file is complete, so nothing is resolved. Nothing is built either: a missing build should say so, and not ask
# for a compiler.
_setup_fill_venv() {
  # These would send the packages elsewhere, or refuse a lock file without hashes.
  unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_REQUIRE_HASHES PIP_CONSTRAINT PIP_QUIET
  unset UV_SYSTEM_PYTHON UV_PYTHON UV_REQUIRE_HASHES UV_CONSTRAINT
  if [[ -n $uv ]]; then
    _setup_run "$uv" --color never pip install --python "$_SETUP_VENV/bin/python" \
      --compile-bytecode --no-deps --no-build -r "$_SETUP_LOCK"
  else
    export PIP_RETRIES=${PIP_RETRIES:-3}
    _setup_run "$_SETUP_VENV/bin/python" -Iu -m pip --no-input --no-color --disable-pip-version-check install \
      --progress-bar off --no-deps --only-binary :all: -r "$_SETUP_LOCK"
  fi
}

_setup_stamp() {
  rm -rf -- "$_SETUP_VENV/tmp"
  { cp -- "$_SETUP_LOCK" "$_SETUP_STAMP.new" && mv -- "$_SETUP_STAMP.new" "$_SETUP_STAMP"; } 2>>"$_SETUP_LOG"
}

# Runs "$@" with its output in the log and its progress on stderr; returns its exit code, and leaves it in code.
_setup_run() {
  "$@" </dev/null >>"$_SETUP_LOG" 2>&1 &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    kill -0 "$$" 2>/dev/null || _setup_interrupted TERM # the script that asked for this is gone
    _setup_progress "$(_setup_activity)"
    sleep 0.3
  done
  wait "$child"
  code=$?
  child=''
  return "$code"
}

# What the installer is at, from the last telling line of its log and the number of packages in place.
_setup_activity() {
  local verb name rest doing present=("$_SETUP_VENV"/lib/python3.*/site-packages/*.dist-info)
  local telling='^ *(Collecting|Using cached|Downloading|Resolved|Prepared|Install|WARNING: Retrying)'
  read -r verb name rest < <(grep -E "$telling" "$_SETUP_LOG" | tail -n 1)
  case $verb in
    '') echo 'making .venv' && return ;;
    Using) doing="fetched ${rest%%-[0-9]*}" ;; # 'Using cached NAME-VERSION-...'
    Collecting) doing="fetching ${name%%==*}" ;;
    Downloading) doing="fetching ${name%%-[0-9]*}" ;;
    WARNING:) doing='the package index does not answer, trying again' ;;
    *) doing='unpacking and compiling' ;;
  esac
  printf '%s of %s packages in place; %s' "$((${#present[@]} - preinstalled))" "$packages" "$doing"
}

# A terminal gets one line, rewritten; anything else a line every 3 seconds.
_setup_progress() {
  if [[ -t 2 ]]; then
    printf '\r\033[Ksetup: %.70s' "$SECONDS s: $1" >&2
  elif ((SECONDS >= next_line)); then
    next_line=$((SECONDS + 3))
    printf 'setup: %s s: %s\n' "$SECONDS" "$1" >&2
  fi
}

_setup_say() {
  [[ ! -t 2 ]] || printf '\r\033[K' >&2
  printf 'setup: %s\n' "$*" >&2
}

_setup_fail() {
  _setup_say "$*"
  exit 2
}

# Dies of the signal that came, as the caller expects of a child.
_setup_interrupted() {
  trap - "$1"
  [[ -z $child ]] || { kill "$child" && wait "$child"; } 2>/dev/null
  _setup_say 'interrupted; the next run starts the installation again'
  kill -s "$1" "$BASHPID"
}

# Says in one line why the installer failed, after giving back the space that it took.
_setup_diagnose() {
  local free cause again="then run this again; its log is $_SETUP_LOG" index=PIP_INDEX_URL cert=PIP_CERT
  [[ $installer == pip ]] || index=UV_DEFAULT_INDEX cert=SSL_CERT_FILE
  free=$(_setup_free_mb)
  _setup_empty
  if ((code == 137)); then
    _setup_fail "$installer was killed, perhaps for want of memory: free some, $again"
  elif ((${free:-99} < 20)) || _setup_log_says 'no space left|os error 28|quota exceeded'; then
    _setup_fail "the disk became full: free $_SETUP_SPACE_MB MB for $_SETUP_VENV and 1000 MB for $installer's cache," \
      "$again"
  elif _setup_log_says 'certificate.?verify|invalid peer certificate|UnknownIssuer'; then
    _setup_fail "$installer does not trust its package index's certificate: set $cert to the right bundle, $again"
  elif _setup_log_says 'os error (13|30)|permission denied|read-only file system'; then
    _setup_fail "$installer may not write where it has to ($cause): make that writable, $again"
  elif _setup_log_says 'connection (refused|reset|aborted|broken)|failed to establish|name resolution|dns error' \
    'timed out|connecttimeout|proxyerror|network is unreachable|network (was|connectivity is) disabled' \
    'incompleteread|failed to fetch|error sending request|could not fetch|ignoring indexes'; then
    _setup_fail "no network: $installer cannot reach its package index; connect, or set $index or HTTPS_PROXY, $again"
  elif _setup_log_says 'no matching distribution found for|no usable wheels|no wheels with|there is no version of'; then
    _setup_fail "the package index lacks a build that is needed ($cause): set $index to a complete one, $again"
  fi
  _setup_log_says 'error:' || cause=$(tail -n 1 -- "$_SETUP_LOG")
  _setup_fail "$installer failed (${cause:-without a word}): mend that, $again"
}

# Whether a line of the log matches one of the patterns; the last one that does is left in cause.
_setup_log_says() {
  local IFS='|'
  cause=$(grep -iE -- "$*" "$_SETUP_LOG" | tail -n 1 | tr -s ' ' | cut -c -160)
  [[ -n $cause ]]
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -u
  ensure_environment
fi
