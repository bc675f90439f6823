# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# collision: one port of a client, at once towards two services that have the same pod: what the
# pod sees must be two conversations, and each answer must find its own.

# collide HOST FAMILY: "POD CLIENT OURS POD CLIENT PORT", of TCP and of UDP
collide() {
	local seen me
	me=$(own "$1" "$2")
	seen=$(talk "$1" collide 100 "$(vip "$2" 11)" "$(vip "$2" 32)" 80)
	echo "$seen"
	[[ $seen =~ ^"tcp pod-a $me OURS pod-a $me "[0-9]+"; udp pod-a $me OURS pod-a $me "[0-9]+$ ]]
}
watch
for way in $ways; do
	name="$(link "${way%:*}"), IPv${way#*:}: one port towards two services of one pod"
	changed=$(counter node1 port_changed)
	check "$name" collide "${way%:*}" "${way#*:}"
	check "$name: one of two got another, TCP and UDP" same "$(($(counter node1 port_changed) - changed))" 2
done
watched collision unsure
