// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/* tail_lifter.bpf.c: the datapath of TailLifter.
 *
 *            VPN interface (tailscale0)                     the host's stack
 *
 *  client ──▶ from_tailnet (ingress) ── client ▸ pod ──▶ conntrack, policies, routes ──▶ pod
 *             parse ▸ flow? ▸ service ▸ backend ▸ flow ▸ rewrite
 *
 *  client ◀── to_tailnet (egress) ◀──── pod ▸ client ── conntrack, policies, routes ◀── pod
 *             parse ▸ flow? ▸ rewrite
 *
 * The stack sees client <-> pod in both directions and nothing of the service, so whatever
 * filters or tracks connections there keeps its say. Packets that are not ours go on untouched
 * to whoever is attached after us. An ICMP error is found by the packet that it quotes and goes
 * the same ways.
 *
 * With --snat there are two more doors, at the far edge, on the interfaces towards pods:
 * to_pods (egress) gives requests this node's address and a port of its own, from_pods
 * (ingress) gives replies the client's back: the stack in between sees client <-> pod as well.
 *
 * A packet is parsed once, into struct packet, with both families as 16-byte addresses; behind
 * the parser only the writers ask for the family. Each door exists for links without a link-layer
 * header (TUN) and for Ethernet. Each packet leaves by open_door(), with one of TL_REASONS.
 * No CO-RE, kfuncs, bpf_loop, timers or callbacks: it loads on 5.10 without BTF. And without
 * CAP_PERFMON, where the verifier follows what a CPU may do in speculation, both ways of each
 * condition it knows: so loops are unrolled, a pointer is asked for NULL once and moves the same on
 * each path, and what is written in pieces stays off the stack, where a number counts as a pointer,
 * which must not be cut. What is global and takes numbers only it walks once.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "tail_lifter.h"

/* linux/icmp.h, which brings half of the C library with it */
enum { ICMP_ECHOREPLY = 0, ICMP_DEST_UNREACH = 3, ICMP_PORT_UNREACH = 3, ICMP_ECHO = 8,
       ICMP_TIME_EXCEEDED = 11, ICMP_PARAMETERPROB = 12 };

#define __inline_always static inline __attribute__((always_inline))

/* === configuration and maps =============================================== */
const volatile __u64 tl_hz = 250; /* jiffies in a second; the agent sets it before loading */

#define MAP(name, kind, n, flags, of, holds)       \
	struct {                                   \
		__uint(type, BPF_MAP_TYPE_##kind); \
		__uint(max_entries, n);            \
		__uint(map_flags, flags);          \
		__type(key, of);                   \
		__type(value, holds);              \
	} name SEC(".maps")

/* The agent writes these, ... */
MAP(svc_map, HASH, TL_MAX_SERVICES, BPF_F_NO_PREALLOC, struct tl_svc_key, struct tl_svc);
MAP(set_map, HASH, TL_MAX_CHUNKS, BPF_F_NO_PREALLOC, struct tl_set_key, struct tl_chunk);
MAP(net_map, LPM_TRIE, TL_MAX_NETS, BPF_F_NO_PREALLOC, struct tl_net_key, __u32);
MAP(door_map, HASH, TL_MAX_DOORS, 0, __u32, struct tl_door);
/* ... these for itself, but what the object declares is created, pinned and adopted, ... */
MAP(text_map, HASH, TL_MAX_TEXTS, BPF_F_NO_PREALLOC, struct tl_text_key, struct tl_text);
MAP(agent_map, ARRAY, 1, 0, __u32, struct tl_agent);
/* ... and the datapath these. */
MAP(ct_map, LRU_HASH, TL_FLOWS, 0, struct tl_tuple, struct tl_flow);
MAP(aff_map, LRU_HASH, TL_AFFINITIES, 0, struct tl_affinity_key, struct tl_affinity);
MAP(frag_map, LRU_HASH, TL_FRAGMENTS, 0, struct tl_tuple, struct tl_frag);
MAP(stat_map, PERCPU_ARRAY, TL_MAX_REASONS, 0, __u32, __u64);

/* === reasons ============================================================== */
/* What is done with a packet: two bits for each reason. */
enum fate { PASS, DROP, REFUSE, ECHO };

__inline_always enum fate fate_of(enum tl_reason reason)
{
#define LOW(name, key, fate, text)  | (__u64)(fate & 1) << TL_##name
#define HIGH(name, key, fate, text) | (__u64)(fate >> 1) << TL_##name
	return ((0 TL_REASONS(LOW)) >> reason & 1) | ((0 TL_REASONS(HIGH)) >> reason & 1) << 1;
}

/* === packet and parse =====================================================
 * What is known of the packet at hand is in a map, of which the verifier knows nothing: it walks on
 * once, not for each way through the parser; and the stack has 512 bytes. Per CPU is enough: no tc
 * program interrupts another (but on PREEMPT_RT without its lock for softirqs). */
struct packet {
	struct tl_tuple tuple; /* of the outermost IP header; ports 0 until parse_ports */
	__u32 l3, l4, end;     /* offsets of the IP header, of what it carries, of its end */
	__u32 frag_id, ifindex;
	__u64 seed;    /* tl_chunk.seed of the backend to prefer, 0: none; then of the one that was chosen */
	__u8 tcp;      /* its flags, enum tcp_flag; 0 until parse_ports, and if it is not TCP */
	bool v6;
	bool fragment; /* part of a fragmented datagram ... */
	bool later;    /* ... and not its first: it has no ports */
	bool odd;      /* headers we cannot follow: not to be steered, see parse_ip */
	/* What is above is cleared for each packet, what follows is not. */
	struct tl_flow flow, other; /* what became of a flow that we were to write down; its other half */
	struct tl_backend backend;  /* that was chosen */
	__u64 hash;                 /* see try_port */
	union { struct ipv6hdr ip6; struct iphdr ip4; }; /* as it came, then what is written; */
	struct tcphdr head;         /* in the same way; of UDP and SCTP the ports */
	struct tl_tuple key, to;    /* to look up; what an error or an echo becomes, or ought to be there */
	struct tl_svc_key svc;
	struct tl_net_key net;
	struct tl_frag first;
	__u32 reason, option, found; /* found: see find_option */
	__u8 quote[TL_QUOTE]; /* see refuse_icmp */
	__u64 answers_since;  /* jiffies: the second in which ... */
	__u64 n_answers;      /* ... so many answers were sent by this CPU */
};

enum tcp_flag { FIN = 0x01, SYN = 0x02, RST = 0x04, ACK = 0x10 };
enum { PACKET, QUOTED, N_PACKETS }; /* the packet at hand; what an ICMP error quotes */

MAP(packet_map, PERCPU_ARRAY, N_PACKETS, 0, __u32, struct packet);

__inline_always void count(struct packet *p, enum tl_reason reason)
{
	__u64 *n;

	p->reason = reason;
	n = bpf_map_lookup_elem(&stat_map, &p->reason);
	if (n)
		(*n)++;
}

/* Of an IP header without options or extensions. */
__inline_always __u32 ip_size(const struct packet *p)
{
	return p->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
}

__inline_always bool is_syn(const struct packet *p)
{
	return (p->tcp & (SYN | ACK)) == SYN;
}

__inline_always bool is_mapped(const struct tl_addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

/* Looks at IPv4's or TCP's option at p->option and goes on to the next; behind the one of this kind there is none. */
static __noinline void next_option(struct __sk_buff *skb, struct packet *p, __u32 end, __u32 kind)
{
	__u32 at = p->option;
	__u8 opt[2];

	p->option = end;
	if (at + sizeof(opt) > end || bpf_skb_load_bytes(skb, at, opt, sizeof(opt)) || !opt[0] ||
	    (opt[0] != 1 && (opt[1] < 2 || at + opt[1] > end)))
		return;
	if (opt[0] == kind)
		p->found = at;
	else
		p->option = opt[0] == 1 ? at + 1 : at + opt[1]; /* 1: NOP, a byte alone */
}

/* Where is the option of this kind? 0: nowhere, or behind TL_OPTIONS others. */
static __noinline __u32 find_option(struct __sk_buff *skb, struct packet *p, __u32 at, __u32 end, __u32 kind)
{
	p->option = at;
	p->found = 0;
#pragma unroll
	for (int i = 0; i < TL_OPTIONS; i++)
		next_option(skb, p, end, kind);
	return p->found;
}

__inline_always int parse_v4(struct __sk_buff *skb, struct packet *p)
{
	const struct iphdr *ip = &p->ip4;
	__u32 ihl = ip->ihl * 4, frag = bpf_ntohs(ip->frag_off) & 0x3fff, options = p->l3 + sizeof(*ip), at;
	__u8 route[3]; /* kind, length, pointer: behind the length when it is used up */

	if (ihl < sizeof(*ip))
		return TL_MALFORMED;
	p->tuple.src.w[2] = p->tuple.dst.w[2] = bpf_htonl(0xffff);
	p->tuple.src.w[3] = ip->saddr;
	p->tuple.dst.w[3] = ip->daddr;
	p->tuple.proto = ip->protocol;
	p->l4 = p->l3 + ihl;
	p->end = p->l3 + bpf_ntohs(ip->tot_len);
	p->frag_id = ip->id;
	p->fragment = frag;
	p->later = frag & 0x1fff;
	if (ihl == sizeof(*ip))
		return 0;
	at = find_option(skb, p, options, p->l4, 131); /* a source route that is not used up: */
	at = at ? at : find_option(skb, p, options, p->l4, 137); /* this is not its destination */
	p->odd = at && !bpf_skb_load_bytes(skb, at, route, sizeof(route)) && route[2] <= route[1];
	return 0;
}

__inline_always bool is_extension(__u8 proto)
{
	return proto == IPPROTO_HOPOPTS || proto == IPPROTO_ROUTING || proto == IPPROTO_DSTOPTS || proto == IPPROTO_FRAGMENT;
}

/* Walks at most TL_EXTENSIONS extension headers (RFC 8200, 4.1 allows each once, one of them twice).
 * What cannot be walked leaves the packet odd: whether that matters depends on whom it is for. */
__inline_always int parse_v6(struct __sk_buff *skb, struct packet *p)
{
	struct {
		__u8 next, len;
		__be16 offset;
		__be32 id;
	} ext;

	__builtin_memcpy(&p->tuple, &p->ip6.saddr, 32);
	if (is_mapped(&p->tuple.src) || is_mapped(&p->tuple.dst))
		return TL_MALFORMED; /* would alias an IPv4 service */
	p->v6 = true;
	p->tuple.proto = p->ip6.nexthdr;
	p->l4 = p->l3 + sizeof(p->ip6);
	p->end = p->ip6.payload_len ? p->l4 + bpf_ntohs(p->ip6.payload_len) : p->l3;
#pragma unroll
	for (int i = 0; i < TL_EXTENSIONS; i++) {
		__u8 next = p->tuple.proto;

		if (!is_extension(next) || p->later || bpf_skb_load_bytes(skb, p->l4, &ext, sizeof(ext)))
			break;
		if (next == IPPROTO_FRAGMENT) {
			p->frag_id = ext.id;
			p->fragment = ext.offset & bpf_htons(0xfff9);
			p->later = ext.offset & bpf_htons(0xfff8);
			p->l4 += sizeof(ext);
		} else { /* a routing header that is not used up: this is not its destination */
			p->odd |= next == IPPROTO_ROUTING && ext.offset & bpf_htons(0x00ff);
			p->l4 += (ext.len + 1) * 8;
		}
		p->tuple.proto = ext.next;
	}
	p->odd |= !p->later && is_extension(p->tuple.proto);
	return 0;
}

/* Another network's, another host's? On a link without Ethernet header skb->protocol is not asked:
 * the version nibble says the same and is there in BPF_PROG_TEST_RUN too. */
__inline_always bool is_foreign(const struct __sk_buff *skb, __u32 l3)
{
	return l3 && (skb->vlan_present || skb->pkt_type == PACKET_OTHERHOST ||
		      (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)));
}

/* Fills *p down to the transport's offset; 0, or the reason to pass. */
static __noinline int parse_ip(struct __sk_buff *skb, struct packet *p, __u32 l3, __u8 dir)
{
	int reason;

	__builtin_memset(p, 0, __builtin_offsetof(struct packet, flow));
	p->l3 = l3;
	p->tuple.dir = dir;
	p->ifindex = skb->ifindex;
	if (bpf_skb_load_bytes(skb, l3, &p->ip4, sizeof(p->ip4)) || (p->ip4.version != 4 && p->ip4.version != 6))
		return TL_NOT_IP;
	reason = p->ip4.version == 4 ? parse_v4(skb, p) :
		 bpf_skb_load_bytes(skb, l3, &p->ip6, sizeof(p->ip6)) ? TL_MALFORMED : parse_v6(skb, p);
	if (p->end == l3 && skb->len - l3 > 0xffff) /* BIG TCP: longer than the field can say, which is 0 */
		p->end = skb->len;
	return reason;
}

/* The same fragments in the same direction: address pair, protocol, IP id. */
__inline_always struct tl_tuple *fragment_key(struct packet *p)
{
	__u8 proto = p->v6 ? 0 : p->tuple.proto; /* RFC 8200: an id stands without protocol */

	p->key = (struct tl_tuple){ p->tuple.src, p->tuple.dst, p->frag_id, p->frag_id >> 16, proto, p->tuple.dir, 0 };
	return &p->key;
}

/* Of a later fragment: what its first one left, if that was lately: ids come again. */
__inline_always bool know_fragment(struct packet *p)
{
	struct tl_frag *first = bpf_map_lookup_elem(&frag_map, fragment_key(p));

	if (!first || (__u32)bpf_jiffies64() - first->seen > TL_FRAGMENT_LIFE * (__u32)tl_hz)
		return false;
	p->tuple.sport = first->sport;
	p->tuple.dport = first->dport;
	p->tuple.proto = first->proto; /* IPv6 says what follows the fragment header: perhaps another header */
	return true;
}

/* Completes the tuple; 0, or why it cannot be. TCP, UDP and SCTP all begin with the two ports. */
__inline_always int parse_ports(struct __sk_buff *skb, struct packet *p)
{
	bool tcp = p->tuple.proto == IPPROTO_TCP;

	if (p->odd || p->end > skb->len)
		return TL_BAD_HEADER;
	if (p->later && know_fragment(p))
		return 0;
	if (!tcp && p->tuple.proto != IPPROTO_UDP && p->tuple.proto != IPPROTO_SCTP)
		return TL_PROTOCOL;
	if (p->later)
		return TL_FRAGMENT;
	if (p->l4 + (tcp ? sizeof(struct tcphdr) : sizeof(struct udphdr)) > p->end ||
	    bpf_skb_load_bytes(skb, p->l4, &p->head, tcp ? sizeof(p->head) : 4))
		return TL_BAD_HEADER;
	p->tuple.sport = p->head.source;
	p->tuple.dport = p->head.dest;
	p->tcp = tcp ? ((__u8 *)&p->head)[13] : 0;
	return 0;
}

/* The type of an ICMP or ICMPv6 message, else -1. */
__inline_always int icmp_type(struct __sk_buff *skb, const struct packet *p)
{
	__u8 type;

	if (p->fragment || p->odd || p->end > skb->len || p->tuple.proto != (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ||
	    bpf_skb_load_bytes(skb, p->l4, &type, 1))
		return -1;
	return type;
}

__inline_always bool is_error(const struct packet *p, int type)
{
	return p->v6 ? type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB :
		       type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

/* === writing ============================================================== */
__inline_always __u16 fold(__u64 sum)
{
	sum = (sum >> 32) + (sum & 0xffffffff);
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return (sum >> 16) + (sum & 0xffff);
}

/* Where the transport's checksum is; 0: it covers neither addresses nor ports that change (SCTP). */
__inline_always __u32 checksum_offset(const struct packet *p)
{
	if (p->tuple.proto == IPPROTO_TCP)
		return p->l4 + __builtin_offsetof(struct tcphdr, check);
	return p->tuple.proto == IPPROTO_UDP ? p->l4 + __builtin_offsetof(struct udphdr, check) : 0;
}

/* Addresses are in the pseudo-header, which is all that a CHECKSUM_PARTIAL packet's field holds. */
__inline_always int write_addresses(struct __sk_buff *skb, struct packet *p, const struct tl_tuple *to, __u32 check, int flags)
{
	__u64 diff = p->v6 ? bpf_csum_diff((void *)&p->tuple, 32, (void *)to, 32, 0) :
			     fold((__u64)~p->tuple.src.w[3] + (__u32)~p->tuple.dst.w[3] + to->src.w[3] + to->dst.w[3]);

	if (check && bpf_l4_csum_replace(skb, check, 0, diff, flags | BPF_F_PSEUDO_HDR))
		return -1;
	if (p->v6) {
		/* CHECKSUM_COMPLETE sums the addresses too. What the helper took off for the
		 * pseudo-header is right for IPv4, whose header has a sum of its own. */
		bpf_csum_update(skb, diff);
		return bpf_skb_store_bytes(skb, p->l3 + 8, &to->src, 32, 0);
	}
	p->ip4.check = ~fold((__u16)~p->ip4.check + diff); /* which no device is left to fill in */
	p->ip4.saddr = to->src.w[3];
	p->ip4.daddr = to->dst.w[3];
	return bpf_skb_store_bytes(skb, p->l3 + __builtin_offsetof(struct iphdr, check), &p->ip4.check, 10, 0);
}

/* Ports are not, and with CHECKSUM_PARTIAL the field must not know of them. */
__inline_always int write_ports(struct __sk_buff *skb, struct packet *p, const struct tl_tuple *to, __u32 check, int flags)
{
	__u32 old = p->tuple.dport << 16 | p->tuple.sport, new = to->dport << 16 | to->sport;

	if (check && bpf_l4_csum_replace(skb, check, old, new, flags | 4))
		return -1;
	return bpf_skb_store_bytes(skb, p->l4, &to->sport, 4, 0);
}

/* === services ============================================================= */
__inline_always __u64 mix(__u64 h)
{
	h = (h ^ h >> 33) * 0xff51afd7ed558ccd;
	h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53;
	return h ^ h >> 33;
}

#define DRAW	     0xff51afd7ed558ccd /* hash and seeds are well mixed, so one multiplication draws */
#define DRAW_HIGHEST 0xb08bbcf3dd5abffb /* times DRAW is 2^64 - 1 */

/* The same on every node for the same client, service address and ports. */
__inline_always __u64 hash_tuple(const struct tl_tuple *t)
{
	__u64 h = (__u64)t->sport << 32 | (__u64)t->dport << 16 | t->proto;

#pragma unroll
	for (int i = 0; i < 4; i++)
		h = mix(h ^ ((__u64)t->src.w[i] << 32 | t->dst.w[i]));
	return h;
}

/* Whose address is it, if no service has the port? */
__inline_always int reason_without_service(struct packet *p)
{
	p->svc = (struct tl_svc_key){ .addr = p->tuple.dst };
	p->net = (struct tl_net_key){ 64 + 128, { 0, 0 }, p->tuple.dst };
	return bpf_map_lookup_elem(&svc_map, &p->svc) ? TL_NO_PORT :
	       bpf_map_lookup_elem(&net_map, &p->net) ? TL_NO_SERVICE : TL_NOT_SERVED;
}

/* Rendezvous hashing (Thaler, Ravishankar 1998): every backend draws a number for this client tuple, the
 * highest wins: `best`, or one of chunks from c on; negative: no such chunk. When one of N backends comes or
 * goes only its own 1/N of the flows move, the shares are even, no table is kept, and a node that has lost
 * everything chooses the same again. For the verifier no backend makes a branch: the agent fills up the last
 * chunk; draws are below 2^63, their last bits are the place. */
__noinline __s64 choose_in(__u64 set, __u32 c, __u32 end, __u64 hash, __s64 best)
{
	struct tl_set_key key = { set, c };
	struct tl_chunk *chunk = bpf_map_lookup_elem(&set_map, &key);

	if (!chunk || c >= end)
		return -1;
#pragma unroll
	for (__u32 i = 0; i < TL_CHUNK; i++) {
		__s64 draw = ((hash ^ chunk->seed[i]) * DRAW >> 1 & -TL_MAX_BACKENDS) | (c * TL_CHUNK + i);
		__s64 lower = (best - draw) >> 63; /* all ones or none */

		asm volatile("" : "+r"(lower)); /* or clang makes a branch of it */
		best ^= (best ^ draw) & lower;
	}
	return best;
}
#define CHOOSE(name, in, chunks)                                                                \
	__noinline __s64 name(__u64 set, __u32 c, __u32 end, __u64 hash, __s64 best)            \
	{                                                                                       \
		_Pragma("unroll") for (int i = 0; i < 16 && c < end && best >= 0; i++, c += chunks) \
			best = in(set, c, end, hash, best);                                     \
		return best;                                                                    \
	}
CHOOSE(choose_among, choose_in, 1)
CHOOSE(choose_all, choose_among, 16)

/* The one of svc that `hash` draws, into p->backend and p->seed; false: they were replaced meanwhile. */
static __noinline bool choose(struct packet *p, const struct tl_svc *svc, __u64 hash)
{
	__s64 best = choose_all(svc->set, 0, (svc->n_backends + TL_CHUNK - 1) / TL_CHUNK, hash, 0);
	struct tl_set_key key = { svc->set, (__u32)best % TL_MAX_BACKENDS / TL_CHUNK };
	struct tl_chunk *chunk;

	if (best < 0)
		return false;
	chunk = bpf_map_lookup_elem(&set_map, &key);
	if (!chunk)
		return false;
	asm volatile("" : "+r"(best)); /* or clang adds to the pointer before it asks for NULL */
	p->seed = chunk->seed[(__u32)best % TL_CHUNK];
	p->backend = chunk->at[(__u32)best % TL_CHUNK];
	return true;
}

/* Chooses for a new flow: what p->seed prefers, if it is in the set, before it what affinity says,
 * else by hash. 0, or why there is no backend. */
__inline_always int backend_for(struct packet *p, const struct tl_svc *svc)
{
	struct tl_affinity_key client = { svc->name, p->tuple.src };
	struct tl_affinity *last, now;
	__u64 prefer = p->seed;

	if (!svc->n_backends)
		return svc->flags & TL_SVC_DROP_IF_EMPTY ? TL_NO_LOCAL_BACKEND : TL_NO_BACKEND;
	if (svc->affinity) {
		last = bpf_map_lookup_elem(&aff_map, &client);
		if (last && bpf_jiffies64() - last->used <= svc->affinity * tl_hz)
			prefer = last->seed;
	}
	if (!(prefer && choose(p, svc, prefer ^ DRAW_HIGHEST) && p->seed == prefer) &&
	    !choose(p, svc, hash_tuple(&p->tuple)))
		return TL_BACKENDS_MOVED;
	if (svc->affinity) {
		now = (struct tl_affinity){ p->seed, bpf_jiffies64() };
		bpf_map_update_elem(&aff_map, &client, &now, BPF_ANY);
	}
	return 0;
}

/* === flows ================================================================ */
/* *t as the far side sends it, in *to. A flow's other half has the key turned(to), and becomes the turned key. */
__inline_always struct tl_tuple *turned(struct tl_tuple *to, const struct tl_tuple *t)
{
	*to = (struct tl_tuple){ t->dst, t->src, t->dport, t->sport, t->proto, t->dir ^ 1, 0 };
	return to;
}

__inline_always bool same_addr(const struct tl_addr *a, const struct tl_addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

__inline_always bool same_tuple(const struct tl_tuple *a, const struct tl_tuple *b)
{
	return a->sport == b->sport && a->dport == b->dport && same_addr(&a->src, &b->src) && same_addr(&a->dst, &b->dst);
}

/* Nobody would hold it against us: conntrack would have forgotten it too. */
__inline_always bool is_expired(const struct tl_flow *flow)
{
	return (__s64)(bpf_jiffies64() - flow->seen) > (__s64)(tl_flow_idle(flow->to.proto, flow->state) * tl_hz);
}

/* Writes the other half of p->flow, p->tuple's, unless it is there; 0, TL_FLOW_HEALED if it had to
 * be written, TL_STALE_REPLY if its place belongs to another flow, TL_FLOW_TABLE if it could not be
 * written. What is written may take the place in memory of any flow that others looked up before. */
static __noinline int keep_other(struct packet *p)
{
	struct tl_flow *there;

	p->other = (struct tl_flow){ .state = p->flow.state, .seen = p->flow.seen, .name = p->flow.name, .seed = p->flow.seed };
	turned(&p->other.to, &p->tuple);
	there = bpf_map_lookup_elem(&ct_map, turned(&p->key, &p->flow.to));
	if (!there) {
		if (!bpf_map_update_elem(&ct_map, &p->key, &p->other, BPF_NOEXIST))
			return TL_FLOW_HEALED;
		there = bpf_map_lookup_elem(&ct_map, &p->key); /* another CPU was faster, or the table is full */
		if (!there)
			return TL_FLOW_TABLE;
	}
	if (same_tuple(&there->to, &p->other.to)) {
		there->seen = p->flow.seen;
		there->state = p->flow.state;
		return 0;
	}
	if (!is_expired(there))
		return TL_STALE_REPLY;
	return bpf_map_update_elem(&ct_map, &p->key, &p->other, BPF_ANY) ? TL_FLOW_TABLE : TL_FLOW_HEALED;
}

/* Accounts for a packet of a known flow, or one that begins `anew`, and when its state changes, and
 * once a second, looks after its other half, so that neither is evicted while it is in use and a lost
 * one returns (invariant 4). 0, or why the flow is no longer good; *at is then where to read on. */
__inline_always int use_flow(struct __sk_buff *skb, struct packet *p, struct tl_flow **at, bool anew)
{
	struct tl_flow *flow = *at;
	bool back = p->tuple.dir & 1;
	__u32 was = anew ? flow->state & TL_FLOW_SNAT : flow->state,
	      state = was | (p->tcp & RST ? TL_FLOW_RST : 0) |
		      (back ? TL_FLOW_ANSWERED : was & TL_FLOW_ANSWERED ? TL_FLOW_OPEN : 0) |
		      (p->tcp & FIN ? (back ? TL_FLOW_FIN_BACK : TL_FLOW_FIN) : 0);
	__u64 now = bpf_jiffies64();
	bool quick = !anew && state == flow->state && now - flow->seen < tl_hz;
	int reason;

	if (!quick && !anew && is_expired(flow))
		return TL_NO_FLOW;
	flow->packets++;
	flow->bytes += skb->len;
	if (quick)
		return 0;
	flow->state = state;
	flow->seen = now;
	p->flow = *flow;
	reason = keep_other(p);
	if (reason == TL_STALE_REPLY || (reason == TL_FLOW_TABLE && !back))
		return reason;
	if (reason == TL_FLOW_HEALED)
		count(p, TL_FLOW_HEALED);
	*at = &p->flow;
	return 0;
}

static __noinline void try_port(struct packet *p, __u32 least)
{
	if (p->reason != TL_STALE_REPLY)
		return;
	p->hash = mix(p->hash);
	p->flow.to.sport = bpf_htons(least + p->hash % (65536 - least));
	p->reason = keep_other(p);
}

/* Writes both halves of a new flow, p->flow, the reply's first: a request never goes out before its
 * reply can come back. If that one's place is taken, by the same client port talking to the same
 * backend through another service, this flow gets another source port (invariant 3), from `least`. */
static __noinline int begin_flow(struct __sk_buff *skb, struct packet *p, __u32 least)
{
	p->hash = hash_tuple(&p->tuple);
	p->flow.seen = bpf_jiffies64();
	p->flow.packets = 1;
	p->flow.bytes = skb->len;
	p->reason = keep_other(p);
	if (p->reason == TL_STALE_REPLY && p->tuple.proto != IPPROTO_SCTP) /* whose checksum we cannot mend */
#pragma unroll
		for (int i = 1; i < TL_PORT_TRIES; i++)
			try_port(p, least);
	if (p->reason == TL_STALE_REPLY)
		return TL_NO_SOURCE_PORT;
	return p->reason == TL_FLOW_TABLE || bpf_map_update_elem(&ct_map, &p->tuple, &p->flow, BPF_ANY) ? TL_FLOW_TABLE : 0;
}

/* Whose backend has left, or that is over: the pair goes, or its replies would be taken for the new
 * one's. What has the other half's place may be another flow's. */
static __noinline void forget_flow(struct packet *p, const struct tl_flow *flow)
{
	struct tl_flow *there = bpf_map_lookup_elem(&ct_map, turned(&p->key, &flow->to));

	if (there && same_tuple(&there->to, turned(&p->to, &p->tuple)))
		bpf_map_delete_elem(&ct_map, &p->key);
	bpf_map_delete_elem(&ct_map, &p->tuple);
}

/* === translation ========================================================== */
/* The MSS in a SYN becomes what fits through the tunnel: larger segments would be cut up or lost. */
static __noinline int clamp_mss(struct __sk_buff *skb, struct packet *p)
{
	struct tl_door *door = bpf_map_lookup_elem(&door_map, &p->ifindex);
	__be16 opt[2], new; /* kind and length, the MSS */
	__u8 doff;
	__u32 at;

	if (!door || door->mtu < 128 || bpf_skb_load_bytes(skb, p->l4 + 12, &doff, 1))
		return 0;
	new = bpf_htons(door->mtu - ip_size(p) - sizeof(struct tcphdr));
	at = find_option(skb, p, p->l4 + sizeof(struct tcphdr), p->l4 + (doff >> 4) * 4, 2);
	if (!at || bpf_skb_load_bytes(skb, at, opt, 4) || opt[0] != bpf_htons(2 << 8 | 4) || bpf_ntohs(opt[1]) <= bpf_ntohs(new))
		return 0;
	if (bpf_skb_store_bytes(skb, at + 2, &new, 2, 0))
		return TL_WRITE;
	if ((at - p->l4) & 1) { /* it lies across two words of the sum */
		opt[1] = opt[1] << 8 | opt[1] >> 8;
		new = new << 8 | new >> 8;
	}
	if (bpf_l4_csum_replace(skb, checksum_offset(p), opt[1], new, 2))
		return TL_WRITE;
	count(p, TL_MSS_CLAMPED);
	return 0;
}

/* Makes the packet what *to says; `done` or why not. A UDP checksum of 0 means none and stays, one
 * that becomes 0 is sent as 0xffff (RFC 768, RFC 8200 8.1). */
static __noinline int translate(struct __sk_buff *skb, struct packet *p, const struct tl_tuple *to, int done)
{
	__u32 check = p->later ? 0 : checksum_offset(p);
	__u64 flags = p->tuple.proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	bool ports = !p->later && (to->sport != p->tuple.sport || to->dport != p->tuple.dport);

	if (p->fragment && !p->later) {
		p->first = (struct tl_frag){ p->tuple.sport, p->tuple.dport, bpf_jiffies64(), p->tuple.proto };
		bpf_map_update_elem(&frag_map, fragment_key(p), &p->first, BPF_ANY);
	}
	if (write_addresses(skb, p, to, check, flags) || (ports && write_ports(skb, p, to, check, flags)) ||
	    (p->tcp & SYN && p->tuple.dir <= TL_REPLY && clamp_mss(skb, p)))
		return TL_WRITE;
	return done;
}

/* An error quotes the packet it is about, whose flow goes the other way: the quote, turned around, is
 * of the flow that the error travels along. The addresses outside become what they would for such a
 * packet, and the quote what its receiver has sent. A router's address stays as the source, but not
 * towards the client: who may send it what is known by address (AllowedIPs). Checksums inside are
 * mended; the ICMP message's then changes only for what they do not cover. 0: about no flow of ours. */
static __noinline int icmp_error(struct __sk_buff *skb, struct packet *p)
{
	__u32 which = QUOTED, check, icmp_check = p->l4 + __builtin_offsetof(struct icmp6hdr, icmp6_cksum);
	struct packet *q = bpf_map_lookup_elem(&packet_map, &which);
	struct tl_flow *flow;
	__be16 old, new;

	if (!q || parse_ip(skb, q, p->l4 + sizeof(struct icmp6hdr), p->tuple.dir ^ 1) || q->v6 != p->v6 || q->odd || q->later ||
	    (q->tuple.proto != IPPROTO_TCP && q->tuple.proto != IPPROTO_UDP && q->tuple.proto != IPPROTO_SCTP) ||
	    q->l4 + 4 > p->end || bpf_skb_load_bytes(skb, q->l4, &q->tuple.sport, 4) ||
	    !same_addr(&q->tuple.src, &p->tuple.dst))
		return 0;
	flow = bpf_map_lookup_elem(&ct_map, turned(&q->key, &q->tuple));
	if (!flow || is_expired(flow))
		return 0;
	p->to = flow->to;
	turned(&q->to, &p->to);
	if (p->tuple.dir != TL_REPLY && !same_addr(&p->tuple.src, &q->key.src))
		p->to.src = p->tuple.src;
	if (write_addresses(skb, p, &p->to, p->v6 ? icmp_check : 0, 0))
		return TL_WRITE;
	check = checksum_offset(q);
	if (check && check + 2 <= p->end && !bpf_skb_load_bytes(skb, check, &old, 2) &&
	    (old || q->tuple.proto != IPPROTO_UDP)) {
		new = ~fold((__u32)bpf_csum_diff((void *)&q->tuple, 36, (void *)&q->to, 36, (__u16)~old));
		if (!new && q->tuple.proto == IPPROTO_UDP)
			new = 0xffff;
		if (bpf_skb_store_bytes(skb, check, &new, 2, 0) || bpf_l4_csum_replace(skb, icmp_check, old, new, 2))
			return TL_WRITE;
	}
	if (write_addresses(skb, q, &q->to, p->v6 ? icmp_check : 0, 0) || write_ports(skb, q, &q->to, icmp_check, 0))
		return TL_WRITE;
	return TL_ICMP_ERROR;
}

/* A packet without ports: the reason of an error about a flow of ours, else `otherwise`. */
__inline_always int without_ports(struct __sk_buff *skb, struct packet *p, int otherwise)
{
	return (is_error(p, icmp_type(skb, p)) ? icmp_error(skb, p) : 0) ?: otherwise;
}

/* === directions =========================================================== */
/* A request without a flow, or a SYN, which asks anew: a flow whose backend is still in the set and
 * that nobody closed stays where it is (the SYN came twice), any other is replaced. */
static __noinline int new_request(struct __sk_buff *skb, struct packet *p)
{
	struct tl_flow *old, *reply;
	struct tl_svc *svc;
	int reason;

	p->svc = (struct tl_svc_key){ p->tuple.dst, p->tuple.dport, p->tuple.proto, 0 };
	svc = bpf_map_lookup_elem(&svc_map, &p->svc);
	if (!svc) {
		if (is_syn(p)) { /* perhaps to a pod itself, from a port whose flow by a service is over */
			reply = bpf_map_lookup_elem(&ct_map, turned(&p->key, &p->tuple));
			if (reply && reply->state & TL_FLOW_CLOSED)
				bpf_map_delete_elem(&ct_map, &p->key);
		}
		return reason_without_service(p);
	}
	if (svc->flags & TL_SVC_SOURCES) {
		p->net = (struct tl_net_key){ 64 + 128, { svc->name, svc->name >> 32 }, p->tuple.src };
		if (!bpf_map_lookup_elem(&net_map, &p->net))
			return TL_SOURCE;
	}
	reason = backend_for(p, svc);
	if (reason)
		return reason;
	old = bpf_map_lookup_elem(&ct_map, &p->tuple);
	if (old) {
		if (old->seed == p->seed && !use_flow(skb, p, &old, true))
			return translate(skb, p, &old->to, TL_REQUEST_SENT);
		forget_flow(p, old);
	}
	p->flow = (struct tl_flow){ .to = p->tuple, .state = p->backend.flags & TL_BACKEND_SNAT ? TL_FLOW_SNAT : 0,
				    .name = svc->name, .seed = p->seed };
	p->flow.to.dst = p->backend.addr;
	p->flow.to.dport = p->backend.port;
	reason = begin_flow(skb, p, 1024);
	if (reason)
		return reason;
	count(p, TL_FLOW_NEW);
	if (p->flow.to.sport != p->tuple.sport)
		count(p, TL_PORT_CHANGED);
	return translate(skb, p, &p->flow.to, TL_REQUEST_SENT);
}

static __noinline int request(struct __sk_buff *skb, struct packet *p)
{
	struct tl_flow *flow;
	int served, type;

	p->reason = parse_ports(skb, p);
	if (p->reason) { /* matters only if it is for one of our addresses */
		served = without_ports(skb, p, 0) ?: reason_without_service(p);
		if (served != TL_NO_PORT || p->reason != TL_PROTOCOL)
			return served == TL_NO_PORT ? (int)p->reason : served;
		type = icmp_type(skb, p);
		return type == (p->v6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO) ? TL_PING :
		       is_error(p, type) ? TL_ICMP_STRAY : TL_PROTOCOL;
	}
	flow = bpf_map_lookup_elem(&ct_map, &p->tuple);
	if (flow) {
		if (!is_syn(p) && !use_flow(skb, p, &flow, false))
			return translate(skb, p, &flow->to, TL_REQUEST_SENT);
		if (!(flow->state & TL_FLOW_CLOSED))
			p->seed = flow->seed;
	}
	return new_request(skb, p);
}

/* What a backend sends, back by the road of its requests. */
static __noinline int from_backend(struct __sk_buff *skb, struct packet *p)
{
	struct tl_flow *flow;
	int reason;

	if (parse_ports(skb, p))
		return without_ports(skb, p, TL_NO_FLOW);
	flow = bpf_map_lookup_elem(&ct_map, &p->tuple);
	if (!flow)
		return TL_NO_FLOW;
	reason = use_flow(skb, p, &flow, false);
	if (!reason)
		return translate(skb, p, &flow->to, p->tuple.dir == TL_REPLY ? TL_REPLY_SENT : TL_SNAT_BACK);
	bpf_map_delete_elem(&ct_map, &p->tuple);
	return reason;
}

/* Source NAT (--snat), where the packet leaves towards a pod, behind all that the stack does. One
 * whose source another masquerade has changed is no longer of a flow we know. */
static __noinline int to_backend(struct __sk_buff *skb, struct packet *p)
{
	struct tl_flow *flow, *of;
	struct tl_door *door;
	int reason;

	if (parse_ports(skb, p))
		return without_ports(skb, p, TL_NO_FLOW);
	flow = bpf_map_lookup_elem(&ct_map, &p->tuple);
	if (flow && !use_flow(skb, p, &flow, is_syn(p)))
		return translate(skb, p, &flow->to, TL_SNAT_OUT);
	turned(&p->key, &p->tuple)->dir = TL_REPLY;
	of = bpf_map_lookup_elem(&ct_map, &p->key);
	door = bpf_map_lookup_elem(&door_map, &p->ifindex);
	if (!of || !(of->state & TL_FLOW_SNAT) || !door)
		return TL_NO_FLOW;
	p->flow = (struct tl_flow){ .to = p->tuple, .name = of->name, .seed = of->seed };
	p->flow.to.src = door->snat[0];
	asm volatile("" ::: "memory"); /* or clang makes a pointer of both */
	if (p->v6)
		p->flow.to.src = door->snat[1];
	if (!p->flow.to.src.w[3] && !p->flow.to.src.w[0])
		return TL_NO_FLOW;
	if (p->tuple.proto != IPPROTO_SCTP)
		p->flow.to.sport = bpf_htons(TL_SNAT_LEAST + hash_tuple(&p->tuple) % (65536 - TL_SNAT_LEAST));
	reason = begin_flow(skb, p, TL_SNAT_LEAST);
	if (reason)
		return reason == TL_NO_SOURCE_PORT ? TL_SNAT_PORTS : reason;
	return translate(skb, p, &p->flow.to, TL_SNAT_OUT);
}

/* === answers ==============================================================
 * The refused packet, or the ping, is the answer itself, turned around and sent out where it came in. */
__inline_always int send_back(struct __sk_buff *skb, const struct packet *p)
{
	__u8 macs[12];

	if (p->l3 && (bpf_skb_load_bytes(skb, 0, macs, 12) || bpf_skb_store_bytes(skb, 0, macs + 6, 6, 0) ||
		      bpf_skb_store_bytes(skb, 6, macs, 6, 0)))
		return -1;
	return bpf_redirect(skb->ifindex, 0);
}

/* Of the pseudo-header; the same both ways. A mapped prefix adds a multiple of 0xffff, which is 0. */
__inline_always __u64 pseudo_sum(const struct packet *p, __u8 proto, __u32 len)
{
	return (__u64)bpf_csum_diff(NULL, 0, (void *)&p->tuple.src, 32, 0) + bpf_htonl(len) + bpf_htonl(proto);
}

/* Sends an answer: an IP header, `size` bytes of p->head, and what is behind; `len` without the IP header. */
static __noinline int send_answer(struct __sk_buff *skb, struct packet *p, __u8 proto, __u32 size, __u32 len)
{
	if (p->v6) {
		p->ip6 = (struct ipv6hdr){ .version = 6, .payload_len = bpf_htons(len), .nexthdr = proto, .hop_limit = 64 };
		__builtin_memcpy(&p->ip6.saddr, &p->tuple.dst, 16);
		__builtin_memcpy(&p->ip6.daddr, &p->tuple.src, 16);
	} else {
		p->ip4 = (struct iphdr){ .version = 4, .ihl = 5, .tot_len = bpf_htons(sizeof(p->ip4) + len), .ttl = 64,
					 .frag_off = bpf_htons(0x4000), /* an id of 0 wants "don't fragment", RFC 6864 */
					 .protocol = proto, .saddr = p->tuple.dst.w[3], .daddr = p->tuple.src.w[3] };
		p->ip4.check = ~fold(bpf_csum_diff(NULL, 0, (void *)&p->ip4, sizeof(p->ip4), 0));
	}
	if (bpf_skb_store_bytes(skb, p->l3, &p->ip4, ip_size(p), 0) ||
	    bpf_skb_store_bytes(skb, p->l3 + ip_size(p), &p->head, size, 0))
		return -1;
	return send_back(skb, p);
}

/* Is the transport's checksum left to the device (CHECKSUM_PARTIAL)? Then a changed port does not show
 * in the field, which is *partial, the sum of the pseudo-header. It is left as it was. */
__inline_always bool is_partial(struct __sk_buff *skb, __u32 check, __u16 *partial)
{
	__u16 after = 0;

	if (bpf_skb_load_bytes(skb, check, partial, 2) || bpf_l4_csum_replace(skb, check, 0, 1, 2) ||
	    bpf_skb_load_bytes(skb, check, &after, 2))
		return false;
	bpf_skb_store_bytes(skb, check, partial, 2, 0);
	return after == *partial;
}

/* A reset with the numbers of RFC 9293, 3.10.7.1. */
__inline_always int refuse_tcp(struct __sk_buff *skb, struct packet *p)
{
	__u32 next = p->end - p->l4;
	struct tcphdr *tcp = &p->head;
	__u16 partial;
	__u64 sum;

	if (tcp->rst)
		return -1;
	next += bpf_ntohl(tcp->seq) - tcp->doff * 4 + tcp->syn + tcp->fin;
	*tcp = (struct tcphdr){ .source = tcp->dest, .dest = tcp->source, .doff = sizeof(*tcp) / 4, .rst = 1, .ack = !tcp->ack,
				.seq = tcp->ack ? tcp->ack_seq : 0, .ack_seq = tcp->ack ? 0 : bpf_htonl(next) };
	sum = pseudo_sum(p, IPPROTO_TCP, sizeof(*tcp));
	tcp->check = is_partial(skb, checksum_offset(p), &partial) ? fold(sum) :
			   ~fold(sum + bpf_csum_diff(NULL, 0, (void *)tcp, sizeof(*tcp), 0));
	if (bpf_skb_change_tail(skb, p->l4 + sizeof(*tcp), 0))
		return -1;
	return send_answer(skb, p, IPPROTO_TCP, sizeof(*tcp), sizeof(*tcp));
}

/* Port unreachable (RFC 792, RFC 4443), quoting what came. What the device sums up when it fills in
 * the quoted checksum becomes the complement of what the field holds now, which our own sum counts. */
__inline_always int refuse_icmp(struct __sk_buff *skb, struct packet *p)
{
	struct icmp6hdr *icmp = (void *)&p->head;
	__u32 check = checksum_offset(p);
	__u64 sum, n = (__u64)p->end - p->l3; /* 64 bits: the verifier sees the bounds */
	__u16 partial;

	*icmp = (struct icmp6hdr){ .icmp6_type = p->v6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH,
				   .icmp6_code = p->v6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH };
	n = n > TL_QUOTE ? TL_QUOTE : n;
	asm volatile("" : "+r"(n)); /* or clang asks for the least first, and a new verifier forgets it */
	__builtin_memset(p->quote, 0, TL_QUOTE);
	if (n < sizeof(struct iphdr) || bpf_skb_load_bytes(skb, p->l3, p->quote, n))
		return -1;
	if (check && is_partial(skb, check, &partial))
		sum = (p->v6 ? bpf_csum_diff(NULL, 0, (void *)p->quote, sizeof(struct ipv6hdr), 0) : 0) + (__u16)~partial;
	else /* an IPv4 header has the sum 0 */
		sum = bpf_csum_diff(NULL, 0, (void *)p->quote, TL_QUOTE, 0);
	sum += *(__u16 *)icmp; /* type and code */
	if (p->v6)
		sum += pseudo_sum(p, IPPROTO_ICMPV6, sizeof(*icmp) + n);
	icmp->icmp6_cksum = ~fold(sum);
	if (bpf_skb_change_tail(skb, p->l3 + n, 0) ||
	    bpf_skb_adjust_room(skb, ip_size(p) + sizeof(*icmp), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	return send_answer(skb, p, p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP, sizeof(*icmp), sizeof(*icmp) + n);
}

/* Addresses change places and the type changes; no other checksum does. */
__inline_always int echo(struct __sk_buff *skb, struct packet *p)
{
	__u8 old = p->v6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO, type = p->v6 ? ICMPV6_ECHO_REPLY : ICMP_ECHOREPLY;

	if (write_addresses(skb, p, turned(&p->to, &p->tuple), 0, 0) || bpf_l4_csum_replace(skb, p->l4 + 2, old, type, 2) ||
	    bpf_skb_store_bytes(skb, p->l4, &type, 1, 0))
		return -1;
	return send_back(skb, p);
}

/* A source that can be written to (RFC 1122 3.2.2.6, RFC 4443 2.4 e). */
__inline_always bool is_host(const struct packet *p)
{
	__u32 v6 = bpf_ntohl(p->tuple.src.w[0]), v4 = bpf_ntohl(p->tuple.src.w[3]);

	return p->v6 ? v6 && v6 < 0xff000000 : v4 && v4 < 0xe0000000 && v4 >> 24 != 127;
}

/* Answers a packet; it is dropped if that is not possible, or was too often. */
static __noinline int answer(struct __sk_buff *skb, struct packet *p, bool ping)
{
	bool plain = p->l4 - p->l3 == ip_size(p) && !p->fragment;
	int action = -1;

	if (bpf_jiffies64() - p->answers_since >= tl_hz) {
		p->answers_since = bpf_jiffies64();
		p->n_answers = 0;
	}
	if ((ping || plain) && is_host(p) && p->n_answers++ < TL_ANSWERS)
		action = ping ? echo(skb, p) : p->tuple.proto == IPPROTO_TCP ? refuse_tcp(skb, p) : refuse_icmp(skb, p);
	if (action >= 0)
		return action;
	count(p, TL_UNANSWERED);
	return TC_ACT_SHOT;
}

/* === doors ================================================================
 * The only entry and the only exit. The section name serves cls_bpf too, where there is no tcx. */
__inline_always int open_door(struct __sk_buff *skb, int (*direction)(struct __sk_buff *, struct packet *), __u32 l3,
			      __u8 dir)
{
	__u32 key = PACKET;
	struct packet *p = bpf_map_lookup_elem(&packet_map, &key);
	enum tl_reason reason;
	enum fate fate;

	if (!p)
		return TC_ACT_UNSPEC;
	reason = is_foreign(skb, l3) ? TL_NOT_IP : parse_ip(skb, p, l3, dir);
	if (!reason)
		reason = direction(skb, p);
	count(p, reason);
	reason = p->reason; /* the same, but the verifier walks on once, not once for each reason */
	fate = fate_of(reason);
	/* On a bridge conntrack has seen the packet already (bridge-nf-call-iptables, which
	 * Kubernetes wants), with our address on it, and would not look again. */
	if (dir == TL_BACK && l3 && (reason == TL_SNAT_BACK || reason == TL_ICMP_ERROR))
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	if (fate == PASS)
		return TC_ACT_UNSPEC; /* as TCX_NEXT: on to the next program, then the stack */
	return fate == DROP ? TC_ACT_SHOT : answer(skb, p, fate == ECHO);
}

#define DOOR(name, hook, direction, l3, dir)               \
	SEC("tcx/" hook)                                   \
	int name(struct __sk_buff *skb)                    \
	{                                                  \
		return open_door(skb, direction, l3, dir); \
	}
DOOR(from_tailnet, "ingress", request, 0, TL_REQUEST)
DOOR(from_tailnet_l2, "ingress", request, ETH_HLEN, TL_REQUEST)
DOOR(to_tailnet, "egress", from_backend, 0, TL_REPLY)
DOOR(to_tailnet_l2, "egress", from_backend, ETH_HLEN, TL_REPLY)
DOOR(to_pods, "egress", to_backend, 0, TL_OUT)
DOOR(to_pods_l2, "egress", to_backend, ETH_HLEN, TL_OUT)
DOOR(from_pods, "ingress", from_backend, 0, TL_BACK)
DOOR(from_pods_l2, "ingress", from_backend, ETH_HLEN, TL_BACK)

char LICENSE[] SEC("license") = "Dual MIT/GPL";
