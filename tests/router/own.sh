# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# own: a backend that is a node itself, as those of kubernetes.default are: what is for this
# one is delivered here and answered from here, and no router ever sees it.

# own_server SETTING SEEN-BY-NODE2-IPV4 SEEN-IPV6
own_server() {
	local way host family name me kind to there
	watch
	for way in $ways; do
		host=${way%:*} family=${way#*:} me=$(own "${way%:*}" "${way#*:}")
		name="the node's own server, $1, $(link "$host"), IPv$family"
		to=$(vip "$family" 29)
		for kind in tcp udp; do
			check "$name, $kind" same "$(talk "$host" ask $kind "$to" 80 | cut -d ' ' -f 1-2)" "node1 $me"
		done
		check "$name: a datagram in fragments, there and back" same "$(talk "$host" ask udp "$to" 80 3300 | cut -d ' ' -f 1-2)" "node1 $me"
		check "$name: a large upload" same "$(talk "$host" mtu tcp "$to" 80 | cut -d ' ' -f 1)" node1
		to=$(vip "$family" 30)
		check "$name: nobody listens, tcp" same "$(talk "$host" ask tcp "$to" 80)" ECONNREFUSED
		check "$name: nobody listens, udp" same "$(talk "$host" refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
		there=$([ "$family" = 4 ] && echo "${2:-}" || echo "${3:-}")
		for kind in tcp udp; do
			check "$name: one of two nodes' servers, $kind" same "$(talk "$host" who $kind "$(vip "$family" 31)" 80 24)" \
				"node1 $me, node2 ${there:-$me}"
		done
	done
	watched "own, $1"
}

offload off # or a quote of what had no checksum yet proves nothing
own_server "--snat off"
for setting in auto on; do
	agent_stop node1 TERM
	lifter node1 --cleanup # or what has begun without goes on without
	agent_start node1 --snat $setting
	own_server "--snat $setting" 192.0.2.1 2001:db8::1
done
agent_stop node1 TERM
lifter node1 --cleanup
agent_start node1
offload on
