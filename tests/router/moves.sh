# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# moves: what we remember goes, or the client's way changes; conversations go on, each with the
# pod it began with: 20 with each of services of three to eight backends.

watch
conversations="client4 client6 laptop4 laptop6"
begin() { # N: so many with each service, half by TCP, half by UDP
	local name number to
	for name in $conversations; do
		to=()
		for number in {23..28}; do to+=("$(vip_port "${name: -1}" "$number" 80)"); done
		flows_start "$name" "${name%?}" "$1" "${to[@]}"
	done
}
end() { local name; for name in $conversations; do flows_end "$name"; done; }
# closed: the pods have said the last word of each; one that comes when all is forgotten goes nowhere
closed() {
	local host
	for host in pod-a pod-b pod-c pod-d; do on $host cat /proc/net/tcp /proc/net/tcp6; done |
		awk '$4 ~ /^(0[1-9B]|0C)$/ && $4 != "06" { print; open = 1 } END { exit open }'
}
# shellcheck disable=SC2086 # words
go_on() { round $conversations; }

begin 20
check "480 conversations" go_on
check "and on" go_on
agent_stop node1 KILL
check "without an agent: they go on" go_on
agent_start node1
check "kill -9 and start: they go on" go_on
agent_stop node1 TERM
agent_start node1
check "stop and start: they go on" go_on
forgotten=$("$WIRE" forget "$(pins node1)/ct_map")
check "lost maps: there was much to lose" test "$forgotten" -ge 960
check "lost maps: they go on" go_on
lifter node1 --cleanup
agent_start node1
check "--cleanup and start: they go on" go_on
routes_by 2
check "another node: they go on" go_on
check "another node: and on" go_on
lifter node1 --cleanup
check "the first one cleaned up: they go on" go_on
lifter node2 --cleanup
# shellcheck disable=SC2086 # words
for name in $conversations; do flows_say "$name" round; done
sleep 0.3
agent_start node2
heard() { local name status=0; for name in $conversations; do flows_hear "$name" || status=1; done; return $status; }
check "--cleanup and start while they speak: they go on" heard
agent_start node1
end
# Not the same ones back at once: node1's conntrack remembers them as they were, and calls
# INVALID what acknowledges bytes that have gone by the other node.
# And without flows of earlier ones, or who has the same port by chance is given another, by one node.
check "ended: and closed" soon 20 closed
for node in $nodes; do "$WIRE" forget "$(pins "$node")/ct_map" >/dev/null; done
begin 4
check "begun by the second node" go_on
routes_by 1
check "moved to the first node: they go on" go_on
end

# A pod that says something again while nothing is remembered, or nobody attached, meets no flow.
watched moves unsure strays
