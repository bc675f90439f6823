# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# check.sh: counting what holds. Sourced.

passed=0 failed=0

# check NAME COMMAND...: one fact. What the command says is shown if it does not hold.
check() {
	local name=$1 said
	shift
	if said=$("$@" 2>&1); then
		passed=$((passed + 1))
		[ -z "${V:-}" ] || printf 'ok    %s\n' "$name"
	else
		failed=$((failed + 1))
		printf 'FAIL  %s\n' "$name"
		printf '      %s\n' "${said//$'\n'/$'\n      '}"
	fi
}

# soon SECONDS COMMAND...: try until it holds; what it said last is shown if it never does.
soon() {
	local until=$((${EPOCHREALTIME/./} + $1 * 1000000)) said
	shift
	until said=$("$@" 2>&1); do
		((${EPOCHREALTIME/./} < until)) || { echo "$said"; echo "still not so: $*"; return 1; }
		sleep 0.05
	done
}

fails() { ! "$@"; }
same() { [ "$1" = "$2" ] || { printf 'is:     %s\nshould: %s\n' "$1" "$2"; return 1; }; }

# says LINE-PATTERN CODE COMMAND...: it exits with CODE and says one line that matches
says() {
	local pattern=$1 code=$2 said status=0
	shift 2
	said=$("$@" 2>&1 >/dev/null) || status=$?
	echo "exit $status: $said"
	[ "$status" = "$code" ] && [ "$(wc -l <<<"$said")" = 1 ] && grep -qE -- "$pattern" <<<"$said"
}

finish() {
	printf '%d passed, %d failed\n' $passed $failed
	[ $failed = 0 ]
}
