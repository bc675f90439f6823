# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# hairpin: a host behind node2, for which node2 is the router into the VPN, asks by node1 for a
# pod of node2: which could answer it directly, and must not.

host_behind node2 guest 101
route node2 10.43.0.0/16 fd43::/112 dev tailscale0
route client 198.18.101.0/24 2001:db8:101::/64 dev vpn2
route node1 198.18.101.0/24 2001:db8:101::/64 dev tailscale0

in_fragments() { # FAMILY SEEN: when the pod has learnt the path's MTU
	same "$(PATIENCE=0.5 talk guest ask udp "$(vip "$1" 15)" 80 3300 | cut -d ' ' -f 1-2)" "pod-c $2"
}
# hairpin NAME SEEN4 SEEN6
hairpin() {
	local kind family seen
	for family in 4 6; do
		seen=$([ $family = 4 ] && echo "$2" || echo "$3")
		for kind in tcp udp; do
			check "a router's own client, $1, IPv$family $kind: its pod" same \
				"$(talk guest ask $kind "$(vip $family 15)" 80 | cut -d ' ' -f 1-2)" "pod-c $seen"
			check "a router's own client, $1, IPv$family $kind: pods of both nodes" same \
				"$(talk guest who $kind "$(vip $family 14)" 80 40 | sed -E 's/ [0-9a-f.:]+(,|$)/\1/g')" "pod-a, pod-b, pod-c, pod-d"
		done
		bridge_looks node2 0
		check "a router's own client, $1, IPv$family: a datagram in fragments" soon 5 in_fragments $family "$seen"
		bridge_looks node2 1
		check "a router's own client, $1, IPv$family: a large upload" same "$(talk guest mtu tcp "$(vip $family 15)" 80 | cut -d ' ' -f 1)" pod-c
	done
}

watch
for family in 4 6; do
	check "a router's own client, IPv$family: without either nothing comes of it" same "$(PATIENCE=0.3 talk guest ask udp "$(vip $family 15)" 80)" "timed out"
done
flannel
hairpin flannel 192.0.2.1 2001:db8::1
no_rules
agent_stop node1 TERM
agent_start node1 --snat auto
hairpin "--snat auto" 192.0.2.1 2001:db8::1
watched hairpin unsure
agent_stop node1 TERM
lifter node1 --cleanup
agent_start node1
