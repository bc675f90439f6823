# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# idle.sh: a hundred services, a real API server, and nothing happens for a minute: what wakes
# the agent is what its watches bring, and nothing else. Sourced by run; an agent runs.

echo "# idle, with 100 services"
hundred() {
	local n
	for n in {1..100}; do
		cat <<-E
			---
			{apiVersion: v1, kind: Service, metadata: {name: idle-$n}, spec: {clusterIP: 10.43.7.$n, ports: [{name: http, port: 80}]}}
			---
			{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4,
			 metadata: {name: idle-$n, labels: {kubernetes.io/service-name: idle-$n}}, ports: [{name: http, port: 8080}],
			 endpoints: [{addresses: [10.42.0.11], nodeName: node}, {addresses: [10.42.1.11], nodeName: node2}]}
		E
	done | kubectl $1 -f -
}
stop lifter
quietly hundred create
lifter
check "100 services: all of them" soon 20 status_is '[.services[] | select(.name | startswith("idle-"))] | length == 100'
sleep 6 # until its watches count as proven
timeout 60 strace -qq -e trace=epoll_wait,epoll_pwait,recvfrom,recvmsg,read,accept4 -o "$dir/idle" -p "${pid[lifter]}" || true
# woken: how often epoll_wait came back; by nothing: because time was up; brought: how often bytes came
read -r woken nothing brought < <(awk '
	/^epoll_p?wait/ { n = $NF; if (/resumed|\) *= [0-9]/) { woken++; nothing += n == 0 } }
	/^(recvfrom|recvmsg|read|accept4)/ && $NF ~ /^[1-9]/ { brought++ }
	END { print woken + 0, nothing + 0, brought + 0 }' "$dir/idle")
resident=$(awk '/^VmRSS/ { print $2 }' "/proc/${pid[lifter]}/status")
echo "# woken $woken times in a minute, $brought reads brought something; $resident kB resident"
check "100 services, a minute: it is looked at" test -s "$dir/idle"
check "100 services, a minute: no wake-up but what the watches bring" test "$nothing" = 0 -a "$woken" -le "$brought"
check "100 services, a minute: four watches have at most three bookmarks each" test "$woken" -le 12
check "100 services: at most 1 MiB resident" test "$resident" -le 1024
quietly hundred delete
