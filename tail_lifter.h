/* SPDX-License-Identifier: (GPL-2.0-only OR MIT)
 *
 * tail_lifter.h: what crosses between the agent (tail_lifter.c) and the
 * datapath (tail_lifter.bpf.c): map keys and values, limits, reasons, flags.
 *
 * Everything here is read by whichever version of the other side comes next:
 * a changed key or value is a new map (the agent notices the size and replaces
 * it). Addresses of both families are 16 bytes, IPv4 as ::ffff:a.b.c.d, so that
 * nothing behind the parser asks for the family; addresses and ports are in
 * network byte order. No member is left to chance by padding: keys are hashed.
 */
#ifndef TAIL_LIFTER_H
#define TAIL_LIFTER_H

#include <linux/types.h>

#define TL_MAX_SERVICES (1 << 17) /* frontends; an empty map takes 16 bytes for each, elements as they come */
#define TL_MAX_CHUNKS	(1 << 17)
#define TL_MAX_TEXTS	(1 << 17)
#define TL_MAX_NETS	(1 << 16)
#define TL_CHUNK	16   /* backends in one value of set_map */
#define TL_MAX_BACKENDS 4096 /* of one service port: what a new flow may look through */
#define TL_TEXT		48   /* bytes in one value of text_map */
#define TL_FLOWS	65536 /* default capacity of ct_map, in entries: two a flow */
#define TL_AFFINITIES	16384
#define TL_FRAGMENTS	4096
#define TL_FRAGMENT_LIFE 30 /* seconds: net.ipv4.ipfrag_time */
#define TL_EXTENSIONS	6   /* IPv6 extension headers we look behind */
#define TL_PORT_TRIES	16  /* source ports tried for a flow whose own is taken */
#define TL_MAX_REASONS	64
#define TL_ANSWERS	1000  /* a second and CPU: what we send ourselves; net.ipv4.icmp_msgs_per_sec */
#define TL_QUOTE	256   /* bytes of a refused packet that its ICMP error quotes */
#define TL_OPTIONS	8     /* TCP options of a SYN looked through for its MSS */
#define TL_SNAT_LEAST	61000 /* and up to 65535: above the usual ip_local_port_range */
#define TL_MAX_DOORS	256   /* interfaces */

struct tl_addr {
	__be32 w[4];
};

/* svc_map: a frontend. An address that has frontends of TL_INTERNAL stands there once
 * more with port 0 and protocol 0: a port that misses is then refused, not passed. */
struct tl_svc_key {
	struct tl_addr addr;
	__be16 port;
	__u8 proto; /* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP */
	__u8 zero;
};

struct tl_svc {
	__u64 set;  /* its backends in set_map: a hash of what they are, so a set never changes */
	__u64 name; /* "NAMESPACE/NAME/PORT/TCP4" in text_map; the same for all its frontends */
	__u32 n_backends;
	__u32 affinity; /* seconds, 0: none */
	__u32 flags;
	__u32 zero;
};

enum tl_svc_flags {
	TL_SVC_SCOPE = 3,	   /* mask: enum tl_scope */
	TL_SVC_DROP_IF_EMPTY = 4,  /* what a new flow meets without backends; else it is rejected */
	TL_SVC_SOURCES = 8,	   /* new flows only from what net_map holds under `name` */
};

enum tl_scope { TL_INTERNAL, TL_EXTERNAL, TL_LOADBALANCER };

/* set_map: TL_CHUNK backends of a set; sorted by address and port over all
 * chunks. A set is there before the first svc_map entry that names it and goes
 * after the last. */
struct tl_set_key {
	__u64 set;
	__u64 chunk;
};

struct tl_backend {
	__u64 node; /* its node's name in text_map, 0: none */
	struct tl_addr addr;
	__be16 port;
	__u16 flags;
	__u32 zero;
};

enum tl_backend_flags {
	TL_BACKEND_LOCAL = 1,
	TL_BACKEND_SNAT = 2, /* it sees this node's address instead of the client's (--snat) */
};

struct tl_chunk {
	__u64 seed[TL_CHUNK]; /* for rendezvous hashing: a hash of address and port alone, not 0 */
	struct tl_backend at[TL_CHUNK];
};

/* text_map: names for --status, cut in pieces, found by their hash. */
struct tl_text_key {
	__u64 text;
	__u32 piece;
	__u32 zero;
};

struct tl_text {
	char at[TL_TEXT]; /* NUL-padded; a last piece ends with a NUL */
};

/* net_map: ranges, by longest prefix. Under scope 0 the service CIDRs, under a
 * service's name its loadBalancerSourceRanges. */
struct tl_net_key {
	__u32 prefixlen; /* 64 + bits of addr */
	__u32 scope[2];	 /* tl_svc.name, or 0; two halves, for the trie's alignment */
	struct tl_addr addr;
};

/* door_map: what the agent knows of an interface we are attached to, by ifindex. New members go
 * to the end: it is carried into the map of another version. */
struct tl_door {
	__u32 mtu;		/* of the VPN: the MSS of SYNs is clamped to it; 0: not */
	__u32 zero;
	struct tl_addr snat[2]; /* towards pods: our address there, IPv4 and IPv6; 0: none */
};

/* ct_map: a flow is a pair of entries. TL_REQUEST is keyed by what the client
 * sends, TL_REPLY by what the backend sends; each says what the packet becomes,
 * so each is enough to find and to restore the other. With source NAT there is a
 * second pair, TL_OUT and TL_BACK, made in the same way, of what leaves towards
 * the backend and what comes back from it. */
struct tl_tuple {
	struct tl_addr src, dst;
	__be16 sport, dport;
	__u8 proto;
	__u8 dir; /* enum tl_dir */
	__u16 zero;
} __attribute__((aligned(8))); /* is copied by fewer instructions */

/* frag_map: the ports of a datagram whose first fragment came by. The key is a tuple
 * with the datagram's id instead of ports; IPv6: and protocol 0. */
struct tl_frag {
	__be16 sport, dport;
	__u32 seen; /* jiffies, the last 32 bits */
	__u32 proto;
};

enum tl_dir { TL_REQUEST, TL_REPLY, TL_OUT, TL_BACK }; /* the last bit: from the backend */

/* Both halves have the same. */
enum tl_flow_state {
	TL_FLOW_ANSWERED = 1,  /* the backend has sent something */
	TL_FLOW_FIN = 2,       /* the client has, */
	TL_FLOW_FIN_BACK = 4,  /* the backend has sent a FIN, */
	TL_FLOW_RST = 8,       /* either of them a RST */
	TL_FLOW_SNAT = 16,     /* begun for a TL_BACKEND_SNAT */
	TL_FLOW_OPEN = 32,     /* the client has sent something since it was answered */
	TL_FLOW_CLOSED = TL_FLOW_FIN | TL_FLOW_FIN_BACK | TL_FLOW_RST,
};

/* Seconds without a packet after which a flow is over. As conntrack's timeouts,
 * kube-proxy's for TCP (nf_conntrack_*_timeout*, --conntrack-tcp-timeout-*). */
static inline __u32 tl_flow_idle(__u8 proto, __u32 state)
{
	if (proto == 17) /* IPPROTO_UDP, for which either side's headers would do */
		return state & TL_FLOW_ANSWERED ? 180 : 30;
	if (state & TL_FLOW_CLOSED)
		return state & TL_FLOW_RST ? 10 : 120;
	return state & TL_FLOW_OPEN ? 86400 : 120;
}

/* New members go to the end, and keys stay as they are: flows are carried into the maps of
 * other versions, see "doors" in tail_lifter.c. */
struct tl_flow {
	struct tl_tuple to; /* the packet becomes this */
	__u32 state;	    /* enum tl_flow_state */
	__u32 zero;
	__u64 seen;  /* jiffies of the last look at the pair, at most a second old while in use */
	__u64 name;  /* tl_svc.name */
	__u64 seed;  /* tl_chunk.seed */
	__u64 packets; /* this way */
	__u64 bytes;
};

/* aff_map: session affinity, by service port and client address. */
struct tl_affinity_key {
	__u64 name;
	struct tl_addr client;
};

struct tl_affinity {
	__u64 seed; /* tl_chunk.seed */
	__u64 used; /* jiffies of its last new flow */
};

/* agent_map: what --status says of the agent, also when it is gone. */
struct tl_agent {
	__u32 pid;
	__u32 synced;
	__u64 changed; /* seconds since 1970 of the last change written, 0: none */
	char source[320];
	char node[256];
	char zone[256];
};

/* Why a packet met its fate. Each line makes the enum, the counter in stat_map
 * (per CPU, by the enum's number), what is done with the packet, and the words in
 * --status. New ones go to the end: numbers outlive versions. Those of TL_EVENTS
 * count beside a packet's own reason. */
#define TL_REASONS(X)                                                                           \
	X(REQUEST_SENT, "request", PASS, "requests sent on to a backend")                       \
	X(REPLY_SENT, "reply", PASS, "replies sent back to the client")                         \
	X(NOT_IP, "not_ip", PASS,                                                               \
	  "passed: neither IPv4 nor IPv6, or of a VLAN, or to another host")                    \
	X(MALFORMED, "malformed", PASS, "passed: header cut short or impossible")               \
	X(NOT_SERVED, "not_served", PASS, "passed: not for a service")                          \
	X(NO_FLOW, "no_flow", PASS, "passed: no packet of a flow")                \
	X(BAD_HEADER, "bad_header", DROP,                                                       \
	  "dropped: for a service, with headers nobody can follow")                             \
	X(PROTOCOL, "protocol", DROP, "dropped: for a service, neither TCP, UDP nor SCTP")      \
	X(NO_BACKEND, "no_backend", REFUSE, "rejected: the service has no backend")             \
	X(NO_LOCAL_BACKEND, "no_local_backend", DROP,                                           \
	  "dropped: policy Local, backends on other nodes only")                                \
	X(NO_PORT, "no_port", REFUSE, "rejected: the service has no such port")                 \
	X(NO_SERVICE, "no_service", DROP,                                                       \
	  "dropped: in the service range, no service's address")                                \
	X(SOURCE, "source", DROP,                                                               \
	  "dropped: not from the service's loadBalancerSourceRanges")                           \
	X(FRAGMENT, "fragment", DROP, "dropped: a fragment whose first part was not seen")      \
	X(BACKENDS_MOVED, "backends_moved", DROP,                                               \
	  "dropped: the backends were replaced while they were looked at")                      \
	X(NO_SOURCE_PORT, "no_source_port", DROP,                                               \
	  "dropped: client port in use towards this backend, no other was free")                \
	X(FLOW_TABLE, "flow_table", DROP, "dropped: ct_map did not take the flow")              \
	X(STALE_REPLY, "stale_reply", DROP,                                                     \
	  "dropped: a reply of a backend its client no longer talks to")                        \
	X(WRITE, "write", DROP, "dropped: the packet could not be rewritten")                   \
	X(FLOW_NEW, "flow_new", PASS, "flows begun")                                            \
	X(FLOW_HEALED, "flow_healed", PASS, "flows whose other half had to be restored")        \
	X(PORT_CHANGED, "port_changed", PASS, "flows that needed another source port")          \
	X(PING, "ping", ECHO, "answered: pings of a service's address")                         \
	X(UNANSWERED, "unanswered", DROP,                                                       \
	  "refused without telling the client: too many, or not possible")                      \
	X(ICMP_ERROR, "icmp_error", PASS,                                                       \
	  "ICMP errors sent along the flow they are about")                                     \
	X(ICMP_STRAY, "icmp_stray", DROP,                                                       \
	  "dropped: an ICMP error to a service, about no flow")                                 \
	X(MSS_CLAMPED, "mss_clamped", PASS,                                                     \
	  "SYNs whose MSS was more than fits through the tunnel")                               \
	X(SNAT_OUT, "snat_out", PASS, "requests that left with this node's address")            \
	X(SNAT_BACK, "snat_back", PASS,                                                         \
	  "replies to this node's address, given the client's")                                 \
	X(SNAT_PORTS, "snat_ports", DROP,                                                       \
	  "dropped: no free source port of this node towards the backend")

#define TL_ENUM(name, key, verdict, text) TL_##name,
enum tl_reason { TL_REASONS(TL_ENUM) TL_N_REASONS };
#undef TL_ENUM

#define TL_EVENTS                                                                    \
	(1ULL << TL_FLOW_NEW | 1ULL << TL_FLOW_HEALED | 1ULL << TL_PORT_CHANGED |    \
	 1ULL << TL_UNANSWERED | 1ULL << TL_MSS_CLAMPED)

#endif
