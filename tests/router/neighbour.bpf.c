// SPDX-License-Identifier: MIT
/* neighbour.bpf.c: somebody else's tc program, with a say: what comes from or goes to
 * one port (behind an IP header without options) is dropped, the rest is the next one's. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

const volatile struct {
	__u32 port, l3;
} wish;

struct {
	__u64 seen, dropped;
} n;

SEC("tcx/ingress")
int neighbour(struct __sk_buff *skb)
{
	__u8 version;
	__be16 ports[2];

	if (bpf_skb_load_bytes(skb, wish.l3, &version, 1) ||
	    bpf_skb_load_bytes(skb, wish.l3 + (version >> 4 == 4 ? 20 : 40), ports, sizeof(ports)))
		return TC_ACT_UNSPEC;
	n.seen++;
	if (bpf_ntohs(ports[0]) != wish.port && bpf_ntohs(ports[1]) != wish.port)
		return TC_ACT_UNSPEC;
	n.dropped++;
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
