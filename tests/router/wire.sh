# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# wire: does who watches the wire see what is wrong?

for host in right wrong; do
	world_host $host
	on $host sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
done
joined right wire wrong wire
"$WIRE" check "$(world_ns right)" >"$world_dir/wire" &
watcher=$!
"$WIRE" check 1/2 "$(world_ns right)" >"$world_dir/half" &
half=$!
world_pids+=("$watcher" "$half")
soon 5 grep -q ready "$world_dir/wire"
soon 5 grep -q ready "$world_dir/half"
should=$(on right ./wrong.py wire)
kill $watcher $half
wait $watcher $half || true
check "what is right and what is wrong is told apart" same \
	"$(sed -n 's/^\(packets [0-9]*\) .*\( whole [0-9]* unsure [0-9]* wrong [0-9]*\) .*/\1\2/p' "$world_dir/wire")" "$should"
echo "router wire: $should"
check "there was enough of it" grep -E ' wrong [3-9][0-9]' <<<"$should"
read -r seen wrong < <(sed -n 's/^packets \([0-9]*\) .* wrong \([0-9]*\) .*/\1 \2/p' "$world_dir/half")
check "one in two: about half of it is looked at" test "$seen" -gt 15 -a "$seen" -lt 58 -a "$wrong" -gt 0
