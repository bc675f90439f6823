# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# flannel.sh: what flannel does to a node. Sourced; needs in_ns HOST COMMAND...

# flannel_rules HOST IPTABLES CLUSTER PODS MULTICAST: the rules that flannel writes on a
# node, in its order, and the one of kube-proxy that hits packets which conntrack
# cannot place.
flannel_rules() {
	in_ns "$1" "$2-restore" <<-E
		*nat
		:FLANNEL-POSTRTG - [0:0]
		-A POSTROUTING -j FLANNEL-POSTRTG
		-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
		-A FLANNEL-POSTRTG -s $4 -d $3 -j RETURN
		-A FLANNEL-POSTRTG -s $3 -d $4 -j RETURN
		-A FLANNEL-POSTRTG ! -s $3 -d $4 -j RETURN
		-A FLANNEL-POSTRTG -s $3 ! -d $5 -j MASQUERADE --random-fully
		-A FLANNEL-POSTRTG ! -s $3 -d $3 -j MASQUERADE --random-fully
		COMMIT
		*filter
		:FLANNEL-FWD - [0:0]
		-A FORWARD -m conntrack --ctstate INVALID -j DROP
		-A FORWARD -j FLANNEL-FWD
		-A FLANNEL-FWD -s $3 -j ACCEPT
		-A FLANNEL-FWD -d $3 -j ACCEPT
		COMMIT
	E
}
