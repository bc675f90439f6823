// SPDX-License-Identifier: MIT
/* prog_run.c: packets through the programs of a real tail_lifter, by BPF_PROG_TEST_RUN.
 *
 *   prog_run [-q] LIFTER PIN_DIR <VECTORS
 *
 * It makes a network namespace with a TUN (vpn3) and an Ethernet link (vpn2, address
 * 02:00:00:00:00:02), and two of the same kinds towards pods: pods3 has 10.42.0.1/24 and
 * fd42::1/64, pods2 has 10.42.1.1/24 and fd42:0:0:1::1/64. It lets LIFTER fill the maps and
 * attach, finds the programs by what LIFTER pinned, and does what the vectors say, a line
 * each:
 *
 *   agent FILE [NODE [SNAT]]                  run LIFTER --once --from FILE --node NODE --snat SNAT
 *   live FILE                                 LIFTER stays: started with FILE, or told of it by
 *                                             SIGHUP; until the next `agent`
 *   row NAME DOOR VERDICT COUNTERS IN OUT     one frame; what must come of it
 *   any NAME DOOR IN                          one frame; the rules for bad input hold
 *   put MAP KEY VALUE | delete MAP KEY        an element; KEY need not be there (ct: used now)
 *   has MAP KEY yes|no                        is it there?
 *   age MAP KEY SECONDS                       last used that long ago (ct, aff, frag)
 *   clear                                     no flows, fragments, affinities
 *
 * DOOR is from (ingress) or to (egress) of the VPN's links, or back (ingress) or out (egress)
 * of those towards pods, which only SNAT has; 2 (Ethernet) or 3 (bare IP); and c if the frame
 * has a checksum over all of it in its skb (CHECKSUM_COMPLETE), which must be right afterwards
 * too; kernels before 6.15 cannot say and run it without. COUNTERS are names of TL_REASONS
 * with commas, each goes up by one and no other. Frames, keys and values are hexadecimal; OUT
 * is = for an unchanged frame, - where nobody looks. VERDICT is a number of linux/pkt_cls.h.
 * # begins a comment.
 *
 * Bad input: one reason, the verdict that it has, and nothing written unless the reason
 * is request, reply, snat_out, snat_back or icmp_error, and then as long as before; or an
 * answer was sent instead.
 *
 * Prints for each row, any and has: LINE ok|FAIL|refused NAME VERDICT COUNTERS OUT, with
 * -q only failures; `refused` is a frame too short for the kernel to test. At last
 * `N passed, N failed` of rows; exit 1 if something failed. Needs nothing but the
 * kernel, /sys and LIFTER, so it also runs in a virtual machine.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/pkt_cls.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "tail_lifter.h"

#ifndef BPF_F_TEST_SKB_CHECKSUM_COMPLETE
#define BPF_F_TEST_SKB_CHECKSUM_COMPLETE (1U << 2) /* Linux 6.15 */
#endif

enum { MAX_FRAME = 4096 }; /* the kernel tests at most about a page */

static const struct {
	const char *name;
	enum { PASS, DROP, REFUSE, ECHO } fate;
} reasons[] = {
#define ENTRY(name, key, fate, text) [TL_##name] = { key, fate },
	TL_REASONS(ENTRY)
};

static const char *lifter, *pin_dir;
static bool quiet;
static const char *const door_word[] = { "from", "to", "back", "out" };
static const char *const link_name[2][2] = { { "vpn3", "vpn2" }, { "pods3", "pods2" } };
static int door[4][2]; /* programs by door_word and link (3, 2); 0: not open */
static int link_index[2][2]; /* as link_name */
static int line, n_passed, n_failed;

/* === maps ================================================================= */
enum map { CT, AFF, FRAG, STAT, SVC, SET, NET, N_MAPS };
static const char *const map_name[N_MAPS] = { "ct", "aff", "frag", "stat", "svc", "set", "net" };
static int map_fd[N_MAPS];

static int pinned(const char *word, int ifindex)
{
	char path[4096];
	int fd;

	if (ifindex)
		snprintf(path, sizeof(path), "%s/%s_%d", pin_dir, word, ifindex);
	else
		snprintf(path, sizeof(path), "%s/%s_map", pin_dir, word);
	fd = bpf_obj_get(path);
	if (fd < 0)
		err(2, "%s", path);
	return fd;
}

static void map_clear(int fd)
{
	char key[256];

	while (!bpf_map_get_next_key(fd, NULL, key))
		if (bpf_map_delete_elem(fd, key))
			err(2, "line %d: clear", line);
}

static __u64 last_use(void)
{
	struct tl_tuple key, *last = NULL;
	struct tl_flow flow;
	__u64 seen = 0;

	for (; !bpf_map_get_next_key(map_fd[CT], last, &key); last = &key)
		if (!bpf_map_lookup_elem(map_fd[CT], &key, &flow) && flow.seen > seen)
			seen = flow.seen;
	return seen;
}

/* As bpf_jiffies64() would say, and a second that many. It counts from where nobody tells,
 * so the first time a flow must have been used just now. */
static __u64 jiffies(__u64 *second)
{
	static __u64 start;
	struct timespec tick, now;
	__u64 ticks;

	clock_getres(CLOCK_MONOTONIC_COARSE, &tick); /* one jiffy */
	clock_gettime(CLOCK_MONOTONIC, &now);
	*second = 1000000000ULL / tick.tv_nsec;
	ticks = now.tv_sec * *second + now.tv_nsec / tick.tv_nsec;
	if (!start)
		start = last_use() - ticks;
	return start + ticks;
}

/* Last used so many seconds ago. */
static int map_age(enum map map, const void *key, int seconds)
{
	union {
		struct tl_flow flow;
		struct tl_affinity aff;
		struct tl_frag frag;
	} value;
	__u64 second, at = jiffies(&second) - seconds * second;

	if (bpf_map_lookup_elem(map_fd[map], key, &value))
		return -1;
	if (map == CT)
		value.flow.seen = at;
	else if (map == AFF)
		value.aff.used = at;
	else
		value.frag.seen = at;
	return bpf_map_update_elem(map_fd[map], key, &value, BPF_EXIST);
}

static bool counters_known; /* those after the frame before are those before this one */

/* All counters, summed over CPUs; in one call where the kernel can (5.13). */
static void counters_read(__u64 sum[TL_N_REASONS])
{
	static __u32 keys[TL_MAX_REASONS], at;
	static __u64 *per_cpu;
	static int n;
	__u32 count = TL_MAX_REASONS;

	if (!per_cpu) {
		n = libbpf_num_possible_cpus();
		per_cpu = calloc(n * TL_MAX_REASONS, sizeof(*per_cpu));
	}
	if (bpf_map_lookup_batch(map_fd[STAT], NULL, &at, keys, per_cpu, &count, NULL) &&
	    errno != ENOENT)
		for (__u32 key = 0; key < TL_N_REASONS; key++)
			if (bpf_map_lookup_elem(map_fd[STAT], &key, per_cpu + key * n))
				err(2, "stat_map");
	for (int key = 0; key < TL_N_REASONS; key++) {
		sum[key] = 0;
		for (int i = 0; i < n; i++)
			sum[key] += per_cpu[key * n + i];
	}
}

/* === the agent and its doors ============================================== */
/* A TUN or TAP that is there as long as we are. */
static int link_make(const char *name, int kind)
{
	struct ifreq ifr = { .ifr_flags = kind | IFF_NO_PI };
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC); /* the link lives as long as this */

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr))
		err(2, "/dev/net/tun: %s", name);
	if (kind == IFF_TAP) {
		ifr.ifr_hwaddr.sa_family = ARPHRD_ETHER;
		memcpy(ifr.ifr_hwaddr.sa_data, "\2\0\0\0\0\2", 6);
		if (ioctl(fd, SIOCSIFHWADDR, &ifr))
			err(2, "address of %s", name);
	}
	return if_nametoindex(name);
}

/* A setting of IPv6 for links that are made from now on. */
static void ipv6_default(const char *name, const char *value)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "/proc/sys/net/ipv6/conf/default/%s", name);
	f = fopen(path, "w");
	if (!f || fputs(value, f) < 0 || fclose(f))
		err(2, "%s", path);
}

/* Up, with addresses and so routes. Without ARP and multicast, nothing is sent that would
 * be counted. */
static void link_address(const char *name, const char *v4, const char *v6)
{
	struct ifreq ifr = { .ifr_flags = IFF_UP | IFF_NOARP };
	struct sockaddr_in in = { .sin_family = AF_INET };
	struct { /* in6_ifreq, but linux/ipv6.h does not go together with musl's headers */
		struct in6_addr addr;
		__u32 prefix;
		int ifindex;
	} in6 = { .prefix = 64, .ifindex = if_nametoindex(name) };
	int s4 = socket(AF_INET, SOCK_DGRAM, 0), s6 = socket(AF_INET6, SOCK_DGRAM, 0), e;

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	inet_pton(AF_INET6, v6, &in6.addr);
	e = ioctl(s4, SIOCSIFFLAGS, &ifr);
	inet_pton(AF_INET, v4, &in.sin_addr);
	memcpy(&ifr.ifr_addr, &in, sizeof(in));
	e = e || ioctl(s4, SIOCSIFADDR, &ifr);
	inet_pton(AF_INET, "255.255.255.0", &in.sin_addr);
	memcpy(&ifr.ifr_netmask, &in, sizeof(in));
	if (e || ioctl(s4, SIOCSIFNETMASK, &ifr) || ioctl(s6, SIOCSIFADDR, &in6))
		err(2, "addresses of %s", name);
	close(s4);
	close(s6);
}

static pid_t start_lifter(const char *command, const char *from, const char *node, const char *snat)
{
	char *argv[] = { (char *)lifter, "-q", "--pin-dir", (char *)pin_dir, "--iface", "vpn2,vpn3",
			 "--node", (char *)node, "--snat", (char *)snat,
			 from ? "--from" : (char *)command, from ? (char *)from : NULL,
			 (char *)command, NULL };
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		dup2(2, 1);
		execv(lifter, argv);
		err(2, "%s", lifter);
	}
	return pid;
}

static int run_lifter(const char *command, const char *from, const char *node, const char *snat)
{
	pid_t pid = start_lifter(command, from, node, snat);
	int status;

	return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ?
		WEXITSTATUS(status) :
		-1;
}

/* The program behind a door: pinned itself, or as a tcx link. */
static int door_open(const char *word, int ifindex)
{
	struct bpf_link_info info = { 0 };
	__u32 len = sizeof(info);
	char self[64], what[64] = "";
	int fd = pinned(word, ifindex), prog;

	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	if (readlink(self, what, sizeof(what) - 1) < 0 || strcmp(what, "anon_inode:bpf-link"))
		return fd;
	if (bpf_link_get_info_by_fd(fd, &info, &len))
		err(2, "%s_%d", word, ifindex);
	close(fd);
	prog = bpf_prog_get_fd_by_id(info.prog_id);
	if (prog < 0)
		err(2, "program of %s_%d", word, ifindex);
	return prog;
}

/* After an agent has started: its programs and maps. */
static void open_all(bool snat)
{
	counters_known = false;
	for (int i = 0; i < 4; i++)
		for (int l2 = 0; l2 < 2; l2++) {
			if (door[i][l2])
				close(door[i][l2]);
			door[i][l2] = 0;
			if (i < 2 || snat)
				door[i][l2] = door_open(door_word[i % 2], link_index[i / 2][l2]);
		}
	for (int i = 0; i < N_MAPS; i++) {
		if (map_fd[i])
			close(map_fd[i]);
		map_fd[i] = pinned(map_name[i], 0);
	}
}

#define PATIENCE 6000 /* times 10 ms, for what a slow machine does at last */

static pid_t living; /* the agent that stays, 0: none */

static void live_end(void)
{
	if (living) {
		kill(living, SIGTERM);
		waitpid(living, NULL, 0);
	}
	living = 0;
}

static int agent(const char *file, const char *node, const char *snat)
{
	live_end();
	if (run_lifter("--once", file, *node ? node : "node", *snat ? snat : "off"))
		return -1;
	open_all(*snat);
	return 0;
}

/* Waits until the living agent has synced later than at `since`. */
static int live_synced(__u64 since)
{
	struct tl_agent now = { 0 };
	char path[4096];
	__u32 zero = 0;
	int fd;

	snprintf(path, sizeof(path), "%s/agent_map", pin_dir);
	for (int i = 0; i < PATIENCE; i++) {
		fd = bpf_obj_get(path);
		if (fd >= 0 && !bpf_map_lookup_elem(fd, &zero, &now) && now.synced &&
		    now.pid == (__u32)living && now.changed > since) {
			close(fd);
			return 0;
		}
		close(fd);
		usleep(10000);
	}
	return -1;
}

/* It reads `live.json`, which becomes what FILE is. It tells of its syncs by the
 * second, so each gets a second of its own. */
static int live(const char *file)
{
	__u64 since = time(NULL);
	bool first = !living;

	unlink("live.json");
	if (symlink(file, "live.json"))
		err(2, "live.json");
	if (first)
		living = start_lifter(NULL, "live.json", "node", "off");
	else
		while ((__u64)time(NULL) <= since)
			usleep(10000);
	if (!first)
		kill(living, SIGHUP);
	if (live_synced(first ? since - 1 : since))
		return -1;
	for (int i = 0; first && i < PATIENCE; i++, usleep(10000)) { /* doors come after the first sync */
		open_all(false);
		if (door[0][0] >= 0 && door[0][1] >= 0 && door[1][0] >= 0 && door[1][1] >= 0)
			return 0;
	}
	return first ? -1 : 0;
}

/* === rows ================================================================= */
static int digit(char c)
{
	const char *all = "0123456789abcdef", *at = strchr(all, c);

	if (!c || !at)
		errx(2, "line %d: %c is not hexadecimal", line, c);
	return at - all;
}

static int from_hex(const char *text, unsigned char *to, int most)
{
	int n = 0;

	for (; text[0] && text[1] && n < most; text += 2, n++)
		to[n] = digit(text[0]) << 4 | digit(text[1]);
	if (*text)
		errx(2, "line %d: too long, or half a byte", line);
	return n;
}

struct result {
	int verdict, len;
	bool refused, bad_csum;
	int n_reasons, n_events, reason; /* counters that went up; the last that is a reason */
	bool twice;			 /* one went up by more than one */
	char counters[512];		 /* their names */
	unsigned char out[MAX_FRAME];
};

static bool is_event(int reason)
{
	return reason == TL_FLOW_NEW || reason == TL_FLOW_HEALED || reason == TL_PORT_CHANGED ||
		reason == TL_UNANSWERED || reason == TL_MSS_CLAMPED;
}

/* The number of that door's word, with what stands behind it. */
static int door_named(const char *where, const char **behind)
{
	for (int i = 0; i < 4; i++) {
		*behind = where + strlen(door_word[i]);
		if (!strncmp(where, door_word[i], strlen(door_word[i])) && door[i][**behind == '2'])
			return i;
	}
	errx(2, "line %d: no door %s", line, where);
}

static void run_frame(const char *where, const unsigned char *in, int len, struct result *r)
{
	const char *behind;
	int word = door_named(where, &behind);
	bool l2 = behind[0] == '2', complete = behind[1] == 'c';
	struct __sk_buff skb = {
		.ifindex = link_index[word / 2][l2]
	}; /* so that it is for this host, by its address */
	LIBBPF_OPTS(bpf_test_run_opts, o, .data_in = in, .data_size_in = len, .data_out = r->out,
		    .data_size_out = MAX_FRAME, .repeat = 1, .ctx_in = &skb,
		    .ctx_size_in = sizeof(skb),
		    .flags = complete ? BPF_F_TEST_SKB_CHECKSUM_COMPLETE : 0);
	static __u64 after[TL_N_REASONS];
	__u64 before[TL_N_REASONS];
	int e;

	r->refused = r->bad_csum = r->twice = false;
	r->n_reasons = r->n_events = 0;
	r->reason = -1;
	r->counters[0] = 0;
	if (!counters_known)
		counters_read(after);
	counters_known = true; /* nobody else is here: the VPN's links are down, the others silent */
	memcpy(before, after, sizeof(before));
	e = bpf_prog_test_run_opts(door[word][l2], &o);
	if (e == -EINVAL && o.flags) {
		o.flags = 0;
		e = bpf_prog_test_run_opts(door[word][l2], &o);
	}
	counters_read(after);
	r->refused = e == -EINVAL;
	r->bad_csum = e == -EBADMSG;
	if (e && !r->refused && !r->bad_csum)
		errx(2, "line %d: BPF_PROG_TEST_RUN: %s", line, strerror(-e));
	r->verdict = o.retval;
	r->len = e ? 0 : o.data_size_out;
	for (int i = 0; i < TL_N_REASONS; i++) {
		if (after[i] == before[i])
			continue;
		r->twice |= after[i] != before[i] + 1;
		if (is_event(i)) {
			r->n_events++;
		} else {
			r->n_reasons++;
			r->reason = i;
		}
		if (r->counters[0])
			strcat(r->counters, ",");
		strcat(r->counters, reasons[i].name);
	}
}

/* Are these the same names, in whatever order? None is part of another's end or
 * beginning between commas. */
static bool same_counters(const char *want, const char *are)
{
	char copy[512], padded[600], name[64];

	snprintf(copy, sizeof(copy), "%s", want);
	snprintf(padded, sizeof(padded), ",%s,", are);
	if (strlen(want) != strlen(are))
		return false;
	for (char *at = strtok(copy, ","); at; at = strtok(NULL, ",")) {
		snprintf(name, sizeof(name), ",%s,", at);
		if (!strstr(padded, name))
			return false;
	}
	return true;
}

static void say(const char *name, const char *state, const struct result *r, bool same)
{
	bool bad = !strcmp(state, "FAIL");

	n_passed += !bad;
	n_failed += bad;
	if (quiet && !bad)
		return;
	printf("%d %s %s", line, state, name);
	if (r) {
		printf(" %d %s %s", r->verdict, r->counters[0] ? r->counters : "-",
		       r->bad_csum	  ? "skb-csum" :
			       r->refused ? "-" :
			       same	  ? "=" :
					    "");
		for (int i = 0; i < r->len && !same; i++)
			putchar("0123456789abcdef"[r->out[i] >> 4]),
				putchar("0123456789abcdef"[r->out[i] & 15]);
	}
	putchar('\n');
}

static void row(char **arg)
{
	static unsigned char in[MAX_FRAME], out[MAX_FRAME];
	static struct result r;
	int len = from_hex(arg[4], in, MAX_FRAME), n = len;
	bool same, good;

	if (arg[5][0] == '=' || arg[5][0] == '-')
		memcpy(out, in, len);
	else
		n = from_hex(arg[5], out, MAX_FRAME);
	run_frame(arg[1], in, len, &r);
	same = r.len == len && !memcmp(r.out, in, len);
	good = !r.refused && !r.bad_csum && !r.twice && r.verdict == atoi(arg[2]) &&
		same_counters(arg[3], r.counters) &&
		(arg[5][0] == '-' || (r.len == n && !memcmp(r.out, out, n)));
	say(arg[0], good ? "ok" : "FAIL", &r, same);
}

/* Is this what may come of a frame with that reason? */
static bool suits(const struct result *r, int len, bool same)
{
	switch (reasons[r->reason].fate) {
	case PASS:
		return (r->verdict == TC_ACT_UNSPEC || (r->verdict == TC_ACT_REDIRECT && !same)) && r->len == len &&
			(same || r->reason == TL_REQUEST_SENT || r->reason == TL_REPLY_SENT ||
			 r->reason == TL_SNAT_OUT || r->reason == TL_SNAT_BACK ||
			 r->reason == TL_ICMP_ERROR);
	case DROP:
		return r->verdict == TC_ACT_SHOT && same;
	default: /* an answer, or none */
		return r->verdict ==
			(strstr(r->counters, "unanswered") ? TC_ACT_SHOT : TC_ACT_REDIRECT);
	}
}

static void any(char **arg)
{
	static unsigned char in[MAX_FRAME];
	static struct result r;
	int len = from_hex(arg[2], in, MAX_FRAME);
	bool same, good;

	run_frame(arg[1], in, len, &r);
	same = r.len == len && !memcmp(r.out, in, len);
	good = r.n_reasons == 1 && !r.twice && !r.bad_csum && suits(&r, len, same);
	say(arg[0], r.refused ? "refused" : good ? "ok" : "FAIL", &r, same);
}

/* === lines ================================================================ */
static enum map map_named(const char *name)
{
	for (int i = 0; i < N_MAPS; i++)
		if (!strcmp(name, map_name[i]))
			return i;
	errx(2, "line %d: no map %s", line, name);
}

static void element(const char *word, char **arg)
{
	unsigned char key[256], value[4096] __attribute__((aligned(8)));
	enum map map = map_named(arg[0]);
	__u64 second;
	bool there;
	int e = 0;

	from_hex(arg[1], key, sizeof(key));
	if (!strcmp(word, "put")) {
		from_hex(arg[2], value, sizeof(value));
		if (map == CT)
			((struct tl_flow *)value)->seen = jiffies(&second);
		e = bpf_map_update_elem(map_fd[map], key, value, BPF_ANY);
	} else if (!strcmp(word, "delete")) {
		bpf_map_delete_elem(map_fd[map], key);
	} else if (!strcmp(word, "age")) {
		e = map_age(map, key, atoi(arg[2]));
	} else {
		there = !bpf_map_lookup_elem(map_fd[map], key, value);
		e = there != !strcmp(arg[2], "yes");
	}
	if (e || !strcmp(word, "has"))
		say(word, e ? "FAIL" : "ok", NULL, true);
}

static void do_line(char *text)
{
	char *arg[8] = { "", "", "", "", "", "", "", "" }, *word = strtok(text, " \n");
	int n = 0;

	while (word && n < 8 && (arg[n] = strtok(NULL, " \n")))
		n++;
	if (!word || *word == '#')
		return;
	if (!strcmp(word, "row") && n == 6)
		row(arg);
	else if (!strcmp(word, "any") && n >= 2)
		any((char *[]){ arg[0], arg[1], n == 3 ? arg[2] : "" });
	else if (!strcmp(word, "agent") && n >= 1 && n <= 3)
		say("agent",
		    agent(arg[0], n > 1 ? arg[1] : "", n > 2 ? arg[2] : "") ? "FAIL" : "ok", NULL,
		    true);
	else if (!strcmp(word, "live") && n == 1)
		say("live", live(arg[0]) ? "FAIL" : "ok", NULL, true);
	else if (!strcmp(word, "clear"))
		map_clear(map_fd[CT]), map_clear(map_fd[AFF]), map_clear(map_fd[FRAG]);
	else if (n >= 2 &&
		 (!strcmp(word, "put") || !strcmp(word, "delete") || !strcmp(word, "age") ||
		  !strcmp(word, "has")))
		element(word, arg);
	else
		errx(2, "line %d: what is %s with %d words?", line, word, n);
}

static void cleanup(void)
{
	static pid_t me;

	if (!me) {
		me = getpid();
	} else if (me == getpid()) { /* not in a child that could not exec */
		live_end();
		run_lifter("--cleanup", NULL, "node", "off");
	}
}

int main(int argc, char **argv)
{
	char *text = NULL;
	size_t room = 0;
	cpu_set_t one;

	quiet = argc > 1 && !strcmp(argv[1], "-q");
	if (argc != 3 + quiet)
		errx(2, "usage: prog_run [-q] LIFTER PIN_DIR <VECTORS");
	lifter = argv[1 + quiet];
	pin_dir = argv[2 + quiet];
	if (unshare(CLONE_NEWNET))
		err(2, "unshare: run as root");
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof(one), &one); /* answers are limited per CPU */
	ipv6_default("addr_gen_mode", "1"); /* no link-local address, which would be announced */
	ipv6_default("router_solicitations", "0");
	for (int i = 0; i < 2; i++)
		for (int l2 = 0; l2 < 2; l2++)
			link_index[i][l2] = link_make(link_name[i][l2], l2 ? IFF_TAP : IFF_TUN);
	link_address("pods3", "10.42.0.1", "fd42::1");
	link_address("pods2", "10.42.1.1", "fd42:0:0:1::1");
	cleanup(); /* remembers who we are */
	atexit(cleanup);
	while (getline(&text, &room, stdin) > 0) {
		line++;
		do_line(text);
		if (line == 1 && n_failed)
			errx(2, "%s does not start", lifter);
	}
	printf("%d passed, %d failed\n", n_passed, n_failed);
	return n_failed > 0;
}
