// SPDX-License-Identifier: MIT
/* wire.c: what the tests of layer `router` need on the wire.
 *
 *   wire check [1/N] NETNS[,FROM...]...
 *                                   looks at every packet, or by chance at one in N, on every interface of these
 *                                   namespaces, both ways, and computes its lengths and
 *                                   checksums anew: IPv4 header, TCP, UDP, SCTP, ICMP, ICMPv6, what
 *                                   ICMP errors quote, fragments when they are whole. Says
 *                                   what is wrong; at SIGTERM a line that counts. FROM is the
 *                                   beginning of an address ("10.42.", "fd42:"): what comes in
 *                                   from there is a stray, and counted
 *   wire flood NETNS N RATE SECONDS ADDRESS:PORT=PODS[@SEEN]...
 *                                   N UDP questions to these services in turn, each from an
 *                                   address and a port of its own, through the TUN flood0 of
 *                                   NETNS, whose other end this is, at most RATE in a second, in
 *                                   no more than SECONDS. Is each answer one of these pods' (the
 *                                   letters of their names), to whoever asked, from who was asked,
 *                                   and right in every sum? Does the pod see who asked, or, with
 *                                   source NAT, SEEN at a port of 61000 to 65535 that nobody else
 *                                   has? Bare are those that come from the pod's own address,
 *                                   because the flow was gone already. PODS is ! where each is
 *                                   to be refused, by port unreachable or a reset
 *   wire syns ...                   the same by TCP: N SYNs, whose SYN-ACKs are the answers; who
 *                                   asked says no more, so they may come again
 *   wire forget MAP                 empties a pinned map
 *
 * Nothing of it is shared with tail_lifter: sums are computed plainly over all bytes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { TCP = 6, UDP = 17, SCTP = 132, ICMP = 1, ICMP6 = 58 };
enum { SYN = 2, RST = 4, ACK = 16 };

static volatile sig_atomic_t stop;

static void on_signal(int sig)
{
	(void)sig;
	stop = 1;
}

static int enter(const char *netns)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s", netns);
	fd = open(path, O_RDONLY);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		err(1, "%s", path);
	return close(fd);
}

static uint32_t get16(const uint8_t *p)
{
	return p[0] << 8 | p[1];
}

/* === a packet =============================================================
 * An IP packet and what is known of it. Each of the functions returns what is wrong, or NULL. */
struct ip {
	const uint8_t *at, *src, *dst, *l4;
	uint32_t n, n_l4; /* bytes that are there; that there should be behind the IP header */
	uint32_t alen;	  /* of an address: 4 or 16 */
	uint32_t id, offset;
	uint8_t proto;
	bool fragment, more;
	bool quoted;  /* in an ICMP error: it may be cut short */
	bool partial; /* its last checksum is left to the device */
};

static struct {
	uint64_t packets, sums, partial, quotes, whole, unsure, wrong, strays, lost;
} n;

static uint32_t add(uint32_t sum, const uint8_t *p, uint32_t len)
{
	for (; len > 1; len -= 2, p += 2) {
		sum += get16(p);
		sum = (sum & 0xffff) + (sum >> 16);
	}
	if (len)
		sum += p[0] << 8;
	return (sum & 0xffff) + (sum >> 16);
}

static uint32_t pseudo_header(const struct ip *ip, uint32_t len)
{
	uint32_t sum = add(add(0, ip->src, ip->alen), ip->dst, ip->alen);

	sum += (len >> 16) + (len & 0xffff) + ip->proto;
	return (sum & 0xffff) + (sum >> 16);
}

/* The checksum `at` bytes behind the transport's beginning; a device that is still to
 * compute it finds the sum of the pseudo-header there. */
static const char *check_sum(const struct ip *ip, uint32_t at, bool pseudo, bool partial)
{
	uint32_t sum = pseudo ? pseudo_header(ip, ip->n_l4) : 0;

	if (partial) {
		n.partial++;
		return sum % 0xffff == get16(ip->l4 + at) % 0xffff ? NULL : "checksum left to the device, pseudo-header's sum";
	}
	n.sums++;
	return add(sum, ip->l4, ip->n_l4) == 0xffff ? NULL : "checksum";
}

/* What is quoted may have been so before its checksum was computed; then nobody can tell,
 * nor mend it when addresses in it change. That is unsure, where offloads are on. */
static bool check_ports_sum(const struct ip *ip, uint32_t at)
{
	if (!check_sum(ip, at, true, ip->partial))
		return false;
	n.unsure += ip->quoted;
	return !ip->quoted;
}

static const char *check_ip(struct ip *ip);

static const char *check_tcp(const struct ip *ip)
{
	if (ip->n_l4 < 20 || (uint32_t)(ip->l4[12] >> 4) * 4 > ip->n_l4 || ip->l4[12] >> 4 < 5)
		return "TCP header's length";
	return check_ports_sum(ip, 16) ? "TCP checksum" : NULL;
}

static const char *check_udp(const struct ip *ip)
{
	if (ip->n_l4 < 8 || get16(ip->l4 + 4) != ip->n_l4)
		return "UDP length";
	if (!get16(ip->l4 + 6))
		return ip->alen == 4 ? NULL : "UDP without checksum over IPv6";
	return check_ports_sum(ip, 6) ? "UDP checksum" : NULL;
}

/* CRC32c, which is of what comes behind the IP header alone (RFC 9260, appendix A). */
static const char *check_sctp(const struct ip *ip)
{
	uint32_t crc = ~0, is;

	if (ip->n_l4 < 16)
		return "SCTP length";
	for (uint32_t i = 0; i < ip->n_l4; i++) {
		crc ^= i >= 8 && i < 12 ? 0 : ip->l4[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (0x82f63b78 & -(crc & 1));
	}
	is = ip->l4[8] | ip->l4[9] << 8 | ip->l4[10] << 16 | (uint32_t)ip->l4[11] << 24;
	n.sums++;
	return is == ~crc ? NULL : "SCTP checksum";
}

static const char *check_filled(const struct ip *ip);

static const char *check_icmp(const struct ip *ip)
{
	uint8_t type;
	bool error;

	if (ip->n_l4 < 8)
		return "ICMP length";
	if (ip->partial)
		return check_filled(ip);
	if (check_sum(ip, 2, ip->alen == 16, false))
		return ip->alen == 16 ? "ICMPv6 checksum" : "ICMP checksum";
	type = ip->l4[0];
	error = ip->alen == 16 ? type >= 1 && type <= 4 : type == 3 || type == 11 || type == 12;
	if (error && !ip->quoted) {
		struct ip quote = { .at = ip->l4 + 8, .n = ip->n_l4 - 8, .quoted = true };

		n.quotes++;
		if (quote.n < 28)
			return "ICMP error without a quote";
		return check_ip(&quote);
	}
	return NULL;
}

static const char *check_l4(const struct ip *ip)
{
	if (ip->n_l4 > ip->n - (ip->l4 - ip->at)) /* a quote, cut short */
		return NULL;
	if (ip->proto == TCP)
		return check_tcp(ip);
	if (ip->proto == UDP)
		return check_udp(ip);
	if (ip->proto == SCTP)
		return check_sctp(ip);
	if (ip->proto == (ip->alen == 16 ? ICMP6 : ICMP))
		return check_icmp(ip);
	return ip->partial ? "a checksum is left to the device, of what?" : NULL;
}

static const char *parse_v4(struct ip *ip)
{
	const uint8_t *p = ip->at;
	uint32_t ihl = (p[0] & 15) * 4, total;

	if (ip->n < 20 || ihl < 20 || ihl > ip->n)
		return "IPv4 header's length";
	if (add(0, p, ihl) != 0xffff)
		return "IPv4 header's checksum";
	total = get16(p + 2);
	if (total < ihl || (ip->quoted ? ip->n > total : ip->n != total))
		return "IPv4 total length";
	ip->src = p + 12;
	ip->dst = p + 16;
	ip->alen = 4;
	ip->proto = p[9];
	ip->l4 = p + ihl;
	ip->n_l4 = total - ihl;
	ip->id = get16(p + 4);
	ip->offset = (get16(p + 6) & 0x1fff) * 8;
	ip->more = p[6] & 0x20;
	ip->fragment = ip->more || ip->offset;
	return NULL;
}

static const char *parse_v6(struct ip *ip)
{
	const uint8_t *p = ip->at, *x = p + 40;
	uint32_t payload = get16(p + 4);

	if (ip->n < 40 || (ip->quoted ? ip->n > payload + 40 : ip->n != payload + 40))
		return "IPv6 payload length";
	ip->src = p + 8;
	ip->dst = p + 24;
	ip->alen = 16;
	ip->proto = p[6];
	while (ip->proto == 0 || ip->proto == 43 || ip->proto == 60 || ip->proto == 44) {
		if (x + 8 > p + ip->n)
			return ip->quoted ? NULL : "IPv6 extension header";
		if (ip->proto == 44) {
			ip->id = get16(x + 4) << 16 | get16(x + 6);
			ip->offset = get16(x + 2) & 0xfff8;
			ip->more = x[3] & 1;
			ip->fragment = ip->more || ip->offset;
		}
		ip->n_l4 = ip->proto == 44 ? 8 : (x[1] + 1) * 8;
		ip->proto = x[0];
		x += ip->n_l4;
	}
	if (x > p + payload + 40)
		return "IPv6 extension header";
	ip->l4 = x;
	ip->n_l4 = p + payload + 40 - x;
	return NULL;
}

static void put16(uint8_t *p, uint32_t v)
{
	p[0] = v >> 8;
	p[1] = v;
}

/* What is left to the device in an error is the checksum of the packet that it was made of
 * and quotes: filled in as the device will do it, all must be right. */
static const char *check_filled(const struct ip *ip)
{
	static uint8_t data[65536];
	struct ip filled = *ip, quote = { .at = data + 8, .n = ip->n_l4 - 8, .quoted = true };
	const char *wrong;
	uint8_t *l4;

	filled.l4 = memcpy(data, ip->l4, ip->n_l4);
	filled.partial = false;
	n.partial++;
	wrong = data[8] >> 4 == 4 ? parse_v4(&quote) : parse_v6(&quote);
	if (wrong || (quote.proto != TCP && quote.proto != UDP) || quote.l4 + (quote.proto == TCP ? 18 : 8) > data + ip->n_l4)
		return "a checksum is left to the device, in an error about what?";
	l4 = data + (quote.l4 - data);
	put16(l4 + (quote.proto == TCP ? 16 : 6), 0xffff - add(0, l4, data + ip->n_l4 - l4));
	return check_icmp(&filled);
}

/* Fragments seen at one place, until they are a whole. */
struct pieces {
	uint32_t id, have, total;
	uint8_t proto, alen, src[16], dst[16];
	int where;
	uint8_t data[65536];
};

static const char *check_fragment(const struct ip *ip, int where)
{
	static struct pieces table[64];
	static uint32_t next;
	struct pieces *p = NULL;

	for (uint32_t i = 0; i < 64 && !p; i++)
		if (table[i].have && table[i].where == where && table[i].id == ip->id && table[i].proto == ip->proto &&
		    table[i].alen == ip->alen && !memcmp(table[i].src, ip->src, ip->alen) && !memcmp(table[i].dst, ip->dst, ip->alen))
			p = &table[i];
	if (!p) {
		p = &table[next++ % 64];
		p->have = p->total = 0;
		p->where = where;
		p->id = ip->id;
		p->proto = ip->proto;
		p->alen = ip->alen;
		memcpy(p->src, ip->src, ip->alen);
		memcpy(p->dst, ip->dst, ip->alen);
	}
	if (ip->offset + ip->n_l4 > sizeof(p->data) || (ip->more && ip->n_l4 % 8))
		return "fragment's length";
	memcpy(p->data + ip->offset, ip->l4, ip->n_l4);
	p->have += ip->n_l4;
	if (!ip->more)
		p->total = ip->offset + ip->n_l4;
	if (p->have != p->total)
		return NULL;
	struct ip all = { .at = p->data, .n = p->total, .src = p->src, .dst = p->dst, .l4 = p->data, .n_l4 = p->total,
			  .alen = p->alen, .proto = p->proto };
	p->have = 0;
	n.whole++;
	return check_l4(&all);
}

static int here; /* where check_ip is: fragments of elsewhere are other ones */

static const char *check_ip(struct ip *ip)
{
	const char *wrong = "IP version";

	if (ip->n >= 20 && ip->at[0] >> 4 == 4)
		wrong = parse_v4(ip);
	else if (ip->n >= 40 && ip->at[0] >> 4 == 6)
		wrong = parse_v6(ip);
	if (wrong || !ip->l4)
		return wrong;
	if (!ip->fragment)
		return check_l4(ip);
	return ip->quoted ? NULL : check_fragment(ip, here);
}

/* === check ================================================================ */
struct watch {
	char *netns, *from[8]; /* from: see the top */
	int fd;
};

static bool is_stray(const struct watch *w, const struct ip *ip)
{
	char text[INET6_ADDRSTRLEN];

	if (!ip->src || !w->from[0])
		return false;
	inet_ntop(ip->alen == 4 ? AF_INET : AF_INET6, ip->src, text, sizeof(text));
	for (int i = 0; i < 8 && w->from[i]; i++)
		if (!strncmp(text, w->from[i], strlen(w->from[i])))
			return true;
	return false;
}

static void show(const struct watch *w, const struct sockaddr_ll *at, const struct ip *ip, const char *what)
{
	char src[INET6_ADDRSTRLEN] = "?", dst[INET6_ADDRSTRLEN] = "?", name[IF_NAMESIZE] = "?";

	enter(w->netns);
	if_indextoname(at->sll_ifindex, name);
	if (ip->src) {
		inet_ntop(ip->alen == 4 ? AF_INET : AF_INET6, ip->src, src, sizeof(src));
		inet_ntop(ip->alen == 4 ? AF_INET : AF_INET6, ip->dst, dst, sizeof(dst));
	}
	printf("%s: %s, %s %s, %s > %s, protocol %d, %u bytes:", what, w->netns, name,
	       at->sll_pkttype == PACKET_OUTGOING ? "out" : "in", src, dst, ip->proto, ip->n);
	for (uint32_t i = 0; i < ip->n && i < 128; i++)
		printf("%s%02x", i % 4 ? "" : " ", ip->at[i]);
	puts("");
}

static void look(struct watch *w, const uint8_t *data, uint32_t len, const struct sockaddr_ll *at, uint32_t status)
{
	struct ip ip = { .at = data, .n = len, .partial = status & TP_STATUS_CSUMNOTREADY };
	const char *wrong;

	if (at->sll_hatype == ARPHRD_LOOPBACK || (at->sll_protocol != htons(0x0800) && at->sll_protocol != htons(0x86dd)))
		return;
	if (at->sll_hatype == ARPHRD_ETHER)
		ip.at += 14, ip.n -= 14;
	here = (int)(w->fd << 16 | at->sll_ifindex << 1 | (at->sll_pkttype == PACKET_OUTGOING));
	n.packets++;
	wrong = check_ip(&ip);
	if (wrong && n.wrong++ < 20)
		show(w, at, &ip, wrong);
	if (at->sll_pkttype != PACKET_OUTGOING && is_stray(w, &ip) && n.strays++ < 5)
		show(w, at, &ip, "stray");
}

/* One packet; false: there is none. */
static bool take(struct watch *w)
{
	static uint8_t data[1 << 17];
	struct sockaddr_ll at;
	union {
		struct cmsghdr first;
		char room[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
	} control;
	struct iovec iov = { data, sizeof(data) };
	struct msghdr msg = { .msg_name = &at, .msg_namelen = sizeof(at), .msg_iov = &iov, .msg_iovlen = 1,
			      .msg_control = &control, .msg_controllen = sizeof(control) };
	ssize_t len = recvmsg(w->fd, &msg, MSG_DONTWAIT);
	struct tpacket_auxdata aux = { 0 };

	if (len < 0)
		return false;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
		if (c->cmsg_level == SOL_PACKET && c->cmsg_type == PACKET_AUXDATA)
			memcpy(&aux, CMSG_DATA(c), sizeof(aux));
	look(w, data, len, &at, aux.tp_status);
	return true;
}

static void watch_open(struct watch *w, char *arg, uint32_t one_in)
{
	struct sock_filter sample[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_RANDOM),
		BPF_STMT(BPF_ALU | BPF_MOD | BPF_K, one_in),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, ~0),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	int on = 1, room = 64 << 20;
	char *save;

	w->netns = strtok_r(arg, ",", &save);
	for (int i = 0; i < 8; i++)
		w->from[i] = strtok_r(NULL, ",", &save);
	enter(w->netns);
	w->fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (w->fd < 0 || setsockopt(w->fd, SOL_PACKET, PACKET_AUXDATA, &on, sizeof(on)) ||
	    setsockopt(w->fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    setsockopt(w->fd, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 5, sample }, sizeof(struct sock_fprog)) ||
	    bind(w->fd, (struct sockaddr *)&(struct sockaddr_ll){ .sll_family = AF_PACKET, .sll_protocol = htons(3) },
		 sizeof(struct sockaddr_ll)))
		err(1, "packet socket");
}

static int check(int argc, char **arg)
{
	struct watch watches[32] = { 0 };
	struct pollfd polls[32];
	struct tpacket_stats lost;
	uint32_t one_in = 1;

	if (argc && sscanf(arg[0], "1/%u", &one_in) == 1)
		argc--, arg++;
	if (argc < 1 || argc > 32 || one_in < 1)
		errx(2, "wire check: 1 to 32 namespaces");
	for (int i = 0; i < argc; i++) {
		watch_open(&watches[i], arg[i], one_in);
		polls[i] = (struct pollfd){ watches[i].fd, POLLIN, 0 };
	}
	puts("ready");
	fflush(stdout);
	while (!stop && (poll(polls, argc, -1) >= 0 || errno == EINTR))
		for (int i = 0; i < argc; i++)
			for (int k = 0; k < 256 && take(&watches[i]); k++)
				;
	for (int i = 0; i < argc; i++) {
		while (take(&watches[i]))
			;
		if (!getsockopt(watches[i].fd, SOL_PACKET, PACKET_STATISTICS, &lost, &(socklen_t){ sizeof(lost) }))
			n.lost += lost.tp_drops;
	}
	printf("packets %lu sums %lu partial %lu quotes %lu whole %lu unsure %lu wrong %lu strays %lu lost %lu\n", n.packets, n.sums,
	       n.partial, n.quotes, n.whole, n.unsure, n.wrong, n.strays, n.lost);
	return n.wrong > 0;
}

/* === flood ================================================================ */
struct service {
	uint8_t addr[16];
	uint32_t alen;
	uint16_t port;
	const char *pods, *seen;
	bool taken[65536]; /* ports by which `seen` was seen */
};

#define WINDOW 64 /* questions at most without an answer */

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Who asks the i-th question: of 100.80.0.0/12 and fd80::/64, a thousand addresses, all ports. */
static uint16_t asker(uint32_t i, uint32_t alen, uint8_t *addr)
{
	static const uint8_t v4[4] = { 100, 80, 0, 0 }, v6[16] = { 0xfd, 0x80 };

	memcpy(addr, alen == 4 ? v4 : v6, alen);
	addr[alen - 2] = i % 1000 >> 8;
	addr[alen - 1] = i % 1000;
	return 1024 + i / 1000 % 64000;
}

/* Its number is in a datagram's text, or a SYN's sequence number. */
static uint32_t question(uint8_t *p, const struct service *to, uint32_t i, bool tcp)
{
	uint32_t head = to->alen == 4 ? 20 : 40, len;
	uint8_t *l4 = p + head;
	struct ip ip = { .alen = to->alen, .proto = tcp ? TCP : UDP, .l4 = l4 };

	memset(p, 0, head + 20);
	ip.src = to->alen == 4 ? p + 12 : p + 8;
	ip.dst = ip.src + to->alen;
	put16(l4, asker(i, to->alen, (uint8_t *)ip.src));
	memcpy((uint8_t *)ip.dst, to->addr, to->alen);
	put16(l4 + 2, to->port);
	if (tcp) {
		put16(l4 + 4, i >> 16);
		put16(l4 + 6, i);
		l4[12] = 5 << 4;
		l4[13] = SYN;
		put16(l4 + 14, 65535);
		len = ip.n_l4 = 20;
	} else {
		len = ip.n_l4 = 8 + sprintf((char *)l4 + 8, "%u\n", i);
		put16(l4 + 4, len);
	}
	put16(l4 + (tcp ? 16 : 6), 0xffff - add(pseudo_header(&ip, len), l4, len));
	if (to->alen == 4) {
		p[0] = 0x45;
		p[8] = 64;
		p[9] = ip.proto;
		put16(p + 2, head + len);
		put16(p + 10, 0xffff - add(0, p, 20));
	} else {
		p[0] = 0x60;
		p[6] = ip.proto;
		p[7] = 64;
		put16(p + 4, len);
	}
	return head + len;
}

static const char *check_sender(const struct ip *ip, const struct service *services, int n_services, uint32_t i)
{
	const struct service *of = &services[i % n_services];
	uint8_t addr[16];
	uint16_t port = asker(i, of->alen, addr);

	if (!memcmp(ip->src, ip->alen == 4 ? "\x0a\x2a" : "\xfd\x42", 2)) /* 10.42.0.0/16, fd42::/16 */
		return "";
	if (ip->alen != of->alen || memcmp(ip->src, of->addr, ip->alen) || get16(ip->l4) != of->port)
		return "an answer from whom we did not ask";
	if (memcmp(ip->dst, addr, ip->alen) || get16(ip->l4 + 2) != port)
		return "an answer to who did not ask";
	return NULL;
}

/* Port unreachable, about a datagram of ours. */
static const char *check_refusal(const struct ip *ip, const struct service *services, int n_services, uint32_t *i)
{
	struct ip quote = { .at = ip->l4 + 8, .n = ip->n_l4 - 8, .quoted = true }, turned;
	bool v4 = ip->alen == 4;
	char text[16] = "";
	uint8_t ports[4];

	if (ip->proto != (v4 ? ICMP : ICMP6) || ip->l4[0] != (v4 ? 3 : 1) || ip->l4[1] != (v4 ? 3 : 4))
		return "not an answer";
	if ((v4 ? parse_v4(&quote) : parse_v6(&quote)) || quote.proto != UDP || quote.n_l4 < 8 || quote.n_l4 >= 8 + sizeof(text) ||
	    quote.l4 + quote.n_l4 > quote.at + quote.n)
		return "a refusal of what?";
	memcpy(text, quote.l4 + 8, quote.n_l4 - 8);
	if (sscanf(text, "%u", i) != 1 || *services[*i % n_services].pods != '!')
		return "a refusal of what was not to be refused";
	if (memcmp(ip->src, quote.dst, ip->alen) || memcmp(ip->dst, quote.src, ip->alen))
		return "a refusal by another, or to another";
	memcpy(ports, quote.l4 + 2, 2);
	memcpy(ports + 2, quote.l4, 2);
	turned = (struct ip){ .alen = ip->alen, .src = quote.dst, .dst = quote.src, .l4 = ports };
	return check_sender(&turned, services, n_services, *i);
}

/* What is wrong with an answer, "" if it is bare; *i is which question it answers. */
static const char *check_answer(const uint8_t *p, uint32_t len, struct service *services, int n_services, uint32_t *i)
{
	struct ip ip = { .at = p, .n = len };
	const char *wrong = check_ip(&ip);
	struct service *of;
	char text[512], who[128], letter;
	uint8_t addr[16];
	uint32_t port, seen;
	bool refused;

	if (wrong)
		return wrong;
	if (ip.proto == TCP) {
		*i = (get16(ip.l4 + 8) << 16 | get16(ip.l4 + 10)) - 1;
		refused = *services[*i % n_services].pods == '!';
		if (ip.l4[13] != ((refused ? RST : SYN) | ACK))
			return refused ? "not a reset" : "not a SYN-ACK";
		return check_sender(&ip, services, n_services, *i);
	}
	if (ip.proto != UDP)
		return check_refusal(&ip, services, n_services, i);
	len = ip.n_l4 - 8 < sizeof(text) ? ip.n_l4 - 8 : sizeof(text) - 1;
	memcpy(text, ip.l4 + 8, len);
	text[len] = 0;
	if (sscanf(text, "pod-%c%*[^ ] answers %127s port %u %u", &letter, who, &seen, i) != 4 &&
	    sscanf(text, "pod-%c answers %127s port %u %u", &letter, who, &seen, i) != 4)
		return "not an answer";
	wrong = check_sender(&ip, services, n_services, *i);
	if (wrong)
		return wrong;
	of = &services[*i % n_services];
	port = asker(*i, of->alen, addr);
	if (!strchr(of->pods, letter))
		return "an answer of another service's pod";
	inet_ntop(ip.alen == 4 ? AF_INET : AF_INET6, addr, text, sizeof(text));
	if (!of->seen)
		return strcmp(text, who) || seen != port ? "the pod saw another" : NULL;
	if (strcmp(of->seen, who) || seen < 61000 || seen > 65535)
		return "the pod saw another than the node";
	if (of->taken[seen])
		return "a port in use was used again";
	of->taken[seen] = true;
	return NULL;
}

/* The kernel begins to send by it a moment after it is opened. */
static int flood_tun(const char *netns)
{
	struct ifreq ifr = { .ifr_flags = IFF_TUN | IFF_NO_PI, .ifr_name = "flood0" };
	int fd, any;

	enter(netns);
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	any = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || any < 0 || ioctl(fd, TUNSETIFF, &ifr))
		err(1, "flood0");
	do
		usleep(100000);
	while (!ioctl(any, SIOCGIFFLAGS, &ifr) && !(ifr.ifr_flags & IFF_RUNNING));
	close(any);
	return fd;
}

static int flood(int argc, char **arg, bool tcp)
{
	static bool had[1 << 20]; /* questions that have been answered */
	uint32_t total = atoi(arg[1]), sent = 0, n_open = 0, answered = 0, wrong = 0, bare = 0, i = 0;
	double begin, end, quiet, rate = atof(arg[2]);
	static struct service services[16];
	uint8_t p[4096];
	int fd, n_services = argc - 4;
	ssize_t len;

	if (n_services < 1 || n_services > 16 || total > sizeof(had))
		errx(2, "wire flood: 1 to 16 services, %zu questions", sizeof(had));
	for (int k = 0; k < n_services; k++) { /* ADDRESS:PORT=PODS */
		struct service *s = &services[k];
		char *pods = strchr(arg[4 + k], '='), *port;

		*pods = 0;
		port = strrchr(arg[4 + k], ':');
		*port = 0;
		s->pods = strtok(pods + 1, "@");
		s->seen = strtok(NULL, "@");
		s->port = atoi(port + 1);
		s->alen = strchr(arg[4 + k], ':') ? 16 : 4;
		if (inet_pton(s->alen == 4 ? AF_INET : AF_INET6, arg[4 + k], s->addr) != 1)
			errx(2, "wire flood: %s", arg[4 + k]);
	}
	fd = flood_tun(arg[0]);
	begin = quiet = now();
	end = begin + atof(arg[3]);
	while (sent < total || (answered < sent && now() - quiet < 0.5)) {
		struct pollfd poll_in = { fd, POLLIN, 0 };

		for (; sent < total && n_open < WINDOW && sent < (now() - begin) * rate; sent++, n_open++) {
			len = question(p, &services[sent % n_services], sent, tcp);
			if (write(fd, p, len) != len)
				err(1, "flood0");
			quiet = now();
		}
		if (poll(&poll_in, 1, n_open ? 50 : 1) == 0)
			n_open = sent < total ? 0 : n_open; /* those were lost on the way */
		while ((len = read(fd, p, sizeof(p))) > 0) {
			const char *what;

			if (p[0] >> 4 == 6 && p[24] == 0xff)
				continue; /* multicast: the kernel says hello to flood0 */
			i = 0;
			what = check_answer(p, len, services, n_services, &i);
			if (i >= sent)
				what = "an answer to what was never asked";
			else if (had[i] && tcp && (!what || !*what))
				continue;
			else if (had[i] && !what)
				what = "a second answer";
			else
				had[i] = true;
			quiet = now();
			answered++;
			n_open -= n_open > 0;
			if (what && !*what)
				bare++;
			else if (what && wrong++ < 10) {
				printf("%s: %zd bytes:", what, len);
				for (int k = 0; k < len && k < 128; k++)
					printf("%s%02x", k % 4 ? "" : " ", p[k]);
				puts("");
			}
		}
		if (sent < total && now() > end)
			total = sent;
	}
	printf("sent %u answered %u wrong %u bare %u seconds %.1f\n", sent, answered, wrong, bare, quiet - begin);
	return wrong > 0;
}

/* === forget =============================================================== */
static int forget(const char *path)
{
	char key[512];
	int map = bpf_obj_get(path), n_gone = 0;

	if (map < 0)
		err(1, "%s", path);
	while (!bpf_map_get_next_key(map, NULL, key) && !bpf_map_delete_elem(map, key))
		n_gone++;
	printf("%d\n", n_gone);
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction act = { .sa_handler = on_signal };

	prctl(PR_SET_PDEATHSIG, SIGTERM);
	sigaction(SIGTERM, &act, NULL);
	if (argc > 2 && !strcmp(argv[1], "check"))
		return check(argc - 2, argv + 2);
	if (argc > 6 && (!strcmp(argv[1], "flood") || !strcmp(argv[1], "syns")))
		return flood(argc - 2, argv + 2, argv[1][0] == 's');
	if (argc == 3 && !strcmp(argv[1], "forget"))
		return forget(argv[2]);
	fprintf(stderr, "usage: wire check [1/N] NETNS[,FROM...]... | wire flood|syns NETNS N RATE SECONDS ADDRESS:PORT=PODS[@SEEN]... | wire forget MAP\n");
	return 2;
}
