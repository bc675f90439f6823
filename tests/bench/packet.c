// SPDX-License-Identifier: MIT
/* packet.c: what a packet costs on its way through a node. tests/bench/packet builds
 * the nodes, draws them and says what is compared; this measures.
 *
 *   packet ROUNDS NODE:SERVICES:REFERENCE...
 *
 * A node is a network namespace NODE with a persistent TUN vpn0 and a bridge to the
 * namespace NODE-pod. SERVICES 0: packets are addressed to the pods; otherwise to
 * service 0 .. SERVICES-1, and REFERENCE is the node whose cost is 1.
 *
 * write() of a UDP packet of 46 bytes into the TUN is all of a request's way: the kernel
 * does the work in that call, up to the pod, which drops the packet at prerouting. In
 * the same way send() on a packet socket in the pod is all of a reply's way, up to the
 * queue of the TUN. The cost is the CPU time of this thread, user and system: the user's
 * part is a loop around one call, the same for all, and their sum is exact where getrusage
 * divides it by ticks. (A kernel with CONFIG_IRQ_TIME_ACCOUNTING leaves the last hop, a
 * softirq, out of it.)
 *
 * In a round each node has its turn, the first being another one each time:
 *   new      conntrack is flushed, then N_NEW packets, each of a flow of its own, to one
 *            service after the other: with many services none is in the CPU's caches
 *   to ten   the same, but to ten of the services, as if the others were there for nothing
 *   request  N_FLOWS flows over all services, each with one reply, so that conntrack
 *            holds them for established; then N_PACKETS of them in turns
 *   reply    the same number back
 * It counts what arrives: a packet that is lost would be a cheap one. Before the first
 * round N_BEFORE flows fill ct_map, as it is on a node that has been up for a while.
 *
 * Prints medians of the rounds, and medians of the ratios within each round. What the
 * kernel's statistics say of our programs comes from one more round, in which they,
 * and so the programs, cost some 30 ns more.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	N_BEFORE = 40000,
	N_NEW = 4000,
	N_FLOWS = 400,
	N_PACKETS = 40000,
	MAX_ROUNDS = 1000,
	MAX_NODES = 64
};
enum { NEW, TO_TEN, REQUEST, REPLY, N_KINDS };
static const char *kinds[] = { "new flow", "to ten", "request", "reply" };

struct packet { /* what a TUN takes: struct virtio_net_hdr, all 0, and the packet */
	uint8_t vnet[10];
	uint8_t ip[20], udp[8], data[18];
} __attribute__((packed));

struct frame {
	uint8_t to[6], from[6], type[2];
	uint8_t ip[20], udp[8], data[18];
} __attribute__((packed));

static struct node {
	const char *name;
	int services;
	struct node *reference;
	int netns, pod_netns, tun, conntrack; /* descriptors */
	int pod;			      /* a packet socket that receives nothing */
	unsigned n_flows;		      /* so many were begun; each is another one */
	double ns[N_KINDS][MAX_ROUNDS];
	double program_ns[N_KINDS]; /* of it in our programs, 0: it has none */
} nodes[MAX_NODES];
static int n_nodes, n_rounds;

/* === packets ============================================================== */
static void put(uint8_t *at, int bytes, uint32_t value)
{
	for (int i = 0; i < bytes; i++)
		at[i] = value >> 8 * (bytes - 1 - i);
}

static uint32_t sum(const uint8_t *at, int bytes)
{
	uint32_t s = 0;

	for (int i = 0; i < bytes; i += 2)
		s += at[i] << 8 | at[i + 1];
	return s;
}

static uint16_t checksum(uint32_t s)
{
	s = (s >> 16) + (s & 0xffff);
	s = (s >> 16) + (s & 0xffff);
	return ~s;
}

/* The packet of the node's flow number `flow`, to `some` of its services, one after the
 * other in no particular order (7919 is a prime). Addresses and ports are those of
 * sync.py load. */
static void packet_make(const struct node *n, unsigned flow, unsigned some, struct packet *p)
{
	unsigned all = n->services ? n->services : 1000;
	unsigned service = (uint64_t)flow * 7919 % some * (all / some);

	memset(p, 0, sizeof(*p));
	put(p->ip, 4, 0x45000000 | (sizeof(*p) - sizeof(p->vnet)));
	put(p->ip + 8, 2, 64 << 8 | IPPROTO_UDP);
	put(p->ip + 12, 4, 0x64400100 + flow / 60000); /* 100.64.1.0 */
	/* 10.43.4.0; 10.42.0.11 */
	put(p->ip + 16, 4, n->services ? 0x0a2b0400 + service : 0x0a2a000b + flow % 2);
	put(p->ip + 10, 2, checksum(sum(p->ip, 20)));
	put(p->udp, 2, 1024 + flow % 60000);
	put(p->udp + 2, 2, n->services ? 80 : 10000 + service);
	put(p->udp + 4, 2, 26);
	put(p->udp + 6, 2, checksum(sum(p->ip + 12, 8) + IPPROTO_UDP + 26 + sum(p->udp, 26)));
}

/* A frame as it came to the pod becomes its reply; no checksum changes. */
static void swap(uint8_t *a, uint8_t *b, int bytes)
{
	for (int i = 0; i < bytes; i++) {
		uint8_t was = a[i];

		a[i] = b[i];
		b[i] = was;
	}
}

static void frame_turn(struct frame *f)
{
	swap(f->to, f->from, 6);
	swap(f->ip + 12, f->ip + 16, 4);
	swap(f->udp, f->udp + 2, 2);
}

/* === a node =============================================================== */
static void enter(int netns)
{
	if (setns(netns, CLONE_NEWNET))
		err(1, "setns");
}

static int netns_open(const char *name, const char *more)
{
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s%s", name, more);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

static int packet_socket(int protocol)
{
	int fd = socket(AF_PACKET, SOCK_RAW, htons(protocol)), yes = 1;
	struct sockaddr_ll eth0 = { .sll_family = AF_PACKET, .sll_protocol = htons(protocol) };

	eth0.sll_ifindex = if_nametoindex("eth0");
	if (fd < 0 || bind(fd, (void *)&eth0, sizeof(eth0)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &yes, sizeof(yes)))
		err(1, "a packet socket in a pod");
	return fd;
}

static void node_open(struct node *n)
{
	struct ifreq ifr = { .ifr_name = "vpn0", .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };

	n->netns = netns_open(n->name, "");
	n->pod_netns = netns_open(n->name, "-pod");
	enter(n->netns);
	n->tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	if (n->tun < 0 || ioctl(n->tun, TUNSETIFF, &ifr))
		err(1, "%s: vpn0", n->name);
	n->conntrack = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	enter(n->pod_netns);
	n->pod = packet_socket(0);
}

static void conntrack_flush(const struct node *n)
{
	struct {
		struct nlmsghdr nl;
		union {
			struct nfgenmsg nf;
			struct nlmsgerr answer;
		};
	} m = { .nl = { .nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK,
			.nlmsg_len = sizeof(m.nl) + sizeof(m.nf) } };

	if (send(n->conntrack, &m, m.nl.nlmsg_len, 0) < 0 ||
	    recv(n->conntrack, &m, sizeof(m), 0) < 0 || (errno = -m.answer.error))
		err(1, "%s: conntrack", n->name);
	usleep(30000); /* freeing goes on after that */
}

/* What came to the pod: packets. */
static unsigned long arrived(const struct node *n)
{
	unsigned long packets = 0;
	char line[512];
	FILE *f;

	enter(n->pod_netns);
	f = fopen("/proc/thread-self/net/dev", "r");
	while (f && fgets(line, sizeof(line), f))
		sscanf(line, " eth0: %*u %lu", &packets);
	if (!f || fclose(f))
		err(1, "/proc/net/dev");
	return packets;
}

/* What came out of the TUN: packets, all of them from where the requests went. */
static unsigned long drain(const struct node *n)
{
	unsigned long packets = 0;
	struct packet p;

	while (read(n->tun, &p, sizeof(p)) == sizeof(p)) {
		if (p.ip[13] != (n->services ? 43 : 42))
			errx(1, "%s: a reply comes from 10.%d, not from the service", n->name,
			     p.ip[13]);
		packets++;
	}
	return packets;
}

/* === measuring ============================================================ */
static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Sends `packets`, n of them, in turns until there were `times`; ns per packet. */
static double send_requests(struct node *n, const struct packet *packets, int n_packets, int times)
{
	unsigned long before = arrived(n), came;
	double began, took;

	began = now_ns();
	for (int i = 0, at = 0; i < times; i++) {
		if (write(n->tun, &packets[at], sizeof(*packets)) < 0)
			err(1, "%s: write to vpn0", n->name);
		at = at + 1 < n_packets ? at + 1 : 0;
	}
	took = now_ns() - began;
	came = arrived(n) - before;
	if (came < (unsigned long)times)
		errx(1, "%s: %lu of %d packets came to the pod", n->name, came, times);
	return took / times;
}

/* As many at a time as there are flows, which is less than the TUN's queue holds. */
static double send_replies(struct node *n, const struct frame *frames, int n_frames, int times)
{
	double took = 0, began;
	unsigned long came = 0;

	for (int sent = 0; sent < times; sent += n_frames) {
		began = now_ns();
		for (int i = 0; i < n_frames; i++)
			if (send(n->pod, &frames[i], sizeof(*frames), 0) < 0)
				err(1, "%s: send from the pod", n->name);
		took += now_ns() - began;
		came += drain(n);
	}
	if (came != (unsigned long)times)
		errx(1, "%s: %lu of %d replies came back", n->name, came, times);
	return took / times;
}

static void make_flows(struct node *n, int services, struct packet *packets, int n_packets)
{
	for (int i = 0; i < n_packets; i++)
		packet_make(n, n->n_flows++, services ? services : 1000, &packets[i]);
}

/* The replies to these packets, each sent once. */
static void make_replies(struct node *n, const struct packet *packets, struct frame *frames,
			 int n_packets)
{
	enter(n->pod_netns);
	int tap = packet_socket(ETH_P_IP);

	for (int i = 0; i < n_packets; i++) {
		if (write(n->tun, &packets[i], sizeof(*packets)) < 0 ||
		    recv(tap, &frames[i], sizeof(*frames), 0) != sizeof(*frames))
			err(1, "%s: the first packet of a flow", n->name);
		frame_turn(&frames[i]);
	}
	close(tap);
	send_replies(n, frames, n_packets, n_packets);
}

/* One turn of a node: ns per packet of each kind. */
static void turn(struct node *n, double ns[N_KINDS], void (*between)(struct node *, int kind))
{
	static struct packet packets[N_NEW];
	static struct frame frames[N_FLOWS];

	for (int kind = NEW; kind <= TO_TEN; kind++) {
		conntrack_flush(n);
		make_flows(n, kind == NEW ? n->services : 10, packets, N_NEW);
		between(n, -1);
		ns[kind] = send_requests(n, packets, N_NEW, N_NEW);
		between(n, kind);
	}
	make_flows(n, n->services, packets, N_FLOWS);
	make_replies(n, packets, frames, N_FLOWS);
	between(n, -1);
	ns[REQUEST] = send_requests(n, packets, N_FLOWS, N_PACKETS);
	between(n, REQUEST);
	ns[REPLY] = send_replies(n, frames, N_FLOWS, N_PACKETS);
	between(n, REPLY);
}

static void nothing(struct node *n, int kind)
{
	(void)n, (void)kind;
}

static void fill(struct node *n)
{
	static struct packet packets[N_NEW];

	for (int i = 0; i < N_BEFORE; i += N_NEW) {
		conntrack_flush(n);
		make_flows(n, n->services, packets, N_NEW);
		send_requests(n, packets, N_NEW, N_NEW);
	}
}

/* === of it in our programs ================================================ */
/* Run time and runs of both doors, as the kernel's own statistics have them. */
static int program_stats(const struct node *n, uint64_t *ns, uint64_t *runs)
{
	char from[256], to[256];
	glob_t found;
	int n_found = 0;

	*ns = *runs = 0;
	snprintf(from, sizeof(from), "/sys/fs/bpf/%s/from_*", n->name);
	snprintf(to, sizeof(to), "/sys/fs/bpf/%s/to_*", n->name);
	if (!glob(from, 0, NULL, &found) && !glob(to, GLOB_APPEND, NULL, &found)) {
		for (size_t i = 0; i < found.gl_pathc; i++) {
			struct bpf_link_info link = {};
			struct bpf_prog_info prog = {};
			uint32_t len = sizeof(link);
			int fd = bpf_obj_get(found.gl_pathv[i]), program = fd;

			if (!bpf_link_get_info_by_fd(fd, &link, &len)) {
				program = bpf_prog_get_fd_by_id(link.prog_id);
				close(fd);
			}
			len = sizeof(prog);
			if (bpf_prog_get_info_by_fd(program, &prog, &len))
				err(1, "%s", found.gl_pathv[i]);
			close(program);
			*ns += prog.run_time_ns;
			*runs += prog.run_cnt;
			n_found++;
		}
		globfree(&found);
	}
	return n_found;
}

static void program_share(struct node *n, int kind)
{
	static uint64_t ns_before, runs_before;
	uint64_t ns, runs;

	if (program_stats(n, &ns, &runs) && kind >= 0)
		n->program_ns[kind] = (double)(ns - ns_before) / (runs - runs_before);
	ns_before = ns;
	runs_before = runs;
}

/* === the table ============================================================ */
static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(const double *of)
{
	double sorted[MAX_ROUNDS];

	memcpy(sorted, of, n_rounds * sizeof(*of));
	qsort(sorted, n_rounds, sizeof(*sorted), by_value);
	return sorted[n_rounds / 2];
}

/* Of what was measured in the same round. */
static double ratio(const struct node *n, const struct node *to, int kind)
{
	double r[MAX_ROUNDS];

	for (int i = 0; i < n_rounds; i++)
		r[i] = n->ns[kind][i] / to->ns[kind][i];
	return median(r);
}

static void print_ratios(const struct node *n, const struct node *to, double budget)
{
	double most = 0, r;

	for (int kind = 0; kind < N_KINDS; kind++) {
		r = ratio(n, to, kind);
		if (to == n->reference)
			printf("%11.0f%7.3f", median(n->ns[kind]), r);
		else
			printf("%11s%7.3f", "", r);
		if (r > most &&
		    (kind >= REQUEST ||
		     to != n->reference)) /* a packet's budget is not for new flows */
			most = r;
	}
	if (!strncmp(n->name, "lifter", 6))
		printf("  budget %.2f: %s", budget, most <= budget ? "kept" : "missed");
	putchar('\n');
}

/* The node with which a variant began: its own, with the fewest services. */
static const struct node *first_like(const struct node *n)
{
	const struct node *first = nodes;

	while (strncmp(first->name, n->name, strcspn(n->name, "-") + 1))
		first++;
	return first;
}

static void print_table(void)
{
	printf("%-22s", "ns, ratio to nftables");
	for (int kind = 0; kind < N_KINDS; kind++)
		printf("%11s%7s", kinds[kind], "");
	putchar('\n');
	for (const struct node *n = nodes; n < nodes + n_nodes; n++) {
		printf("%-22s", n->name);
		print_ratios(n, n->reference, 1.05);
		if (!n->program_ns[REQUEST])
			continue;
		printf("%-22s", "  our program's part");
		for (int kind = 0; kind < N_KINDS; kind++)
			printf("%11.0f%7s", n->program_ns[kind], "");
		putchar('\n');
	}
	puts("\nratio to the first of its kind");
	for (const struct node *n = nodes; n < nodes + n_nodes; n++)
		if (first_like(n) != n) {
			printf("%-22s", n->name);
			print_ratios(n, first_like(n), 1.05);
		}
}

static struct node *node_named(const char *name)
{
	for (struct node *n = nodes; n < nodes + n_nodes; n++)
		if (!strcmp(n->name, name))
			return n;
	errx(2, "no such node: %s", name);
}

int main(int argc, char **argv)
{
	cpu_set_t last;
	char *references[MAX_NODES];

	if (argc < 3 || argc - 2 > MAX_NODES || (n_rounds = atoi(argv[1])) < 1 ||
	    n_rounds > MAX_ROUNDS)
		errx(2, "usage: packet ROUNDS NODE:SERVICES:REFERENCE...");
	CPU_ZERO(&last);
	CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &last);
	sched_setaffinity(0, sizeof(last), &last);
	for (n_nodes = 0; n_nodes < argc - 2; n_nodes++) {
		char *arg = argv[2 + n_nodes];

		nodes[n_nodes].name = strsep(&arg, ":");
		nodes[n_nodes].services = atoi(strsep(&arg, ":"));
		references[n_nodes] = arg;
		node_open(&nodes[n_nodes]);
	}
	for (int i = 0; i < n_nodes; i++) {
		nodes[i].reference = node_named(references[i]);
		fill(&nodes[i]);
	}
	for (int round = 0; round < n_rounds; round++)
		for (int i = 0; i < n_nodes; i++) {
			struct node *n = &nodes[(i + round) % n_nodes];
			double ns[N_KINDS];

			turn(n, ns, nothing);
			for (int kind = 0; kind < N_KINDS; kind++)
				n->ns[kind][round] = ns[kind];
		}
	if (bpf_enable_stats(BPF_STATS_RUN_TIME) <
	    0) /* until we exit; they cost something themselves: apart */
		err(1, "BPF statistics");
	for (int i = 0; i < n_nodes; i++) {
		double ns[N_KINDS];

		turn(&nodes[i], ns, program_share);
	}
	print_table();
	return 0;
}
