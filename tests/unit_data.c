/* The data half of the agent: JSON, splitting, selectors, addresses, VIPs, the
 * model under random events. Includes the real program. Prints only what
 * fails, then "N passed, N failed". */
#define main tail_lifter_main
#include "../tail_lifter.c"
#undef main
#include <sys/resource.h>

static int n_passed, n_failed;

__attribute__((format(printf, 3, 4))) static void check(bool good, const char *name,
							const char *fmt, ...)
{
	va_list ap;

	if (good) {
		n_passed++;
		return;
	}
	n_failed++;
	va_start(ap, fmt);
	printf("not ok %s: ", name);
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
}

/* --- JSON: text, and whether it is a whole value --------------------------- */
static const struct {
	const char *text;
	bool good;
} texts[] = {
	{ "{}", true },
	{ " [ ] ", true },
	{ "{\"a\":1}", true },
	{ "[1,2]", true },
	{ "[[],{},\"\"]", true },
	{ "[0,-0,0.0,-1.5e+10,1E9,10e-2]", true },
	{ "[true,false,null]", true },
	{ "[\"\\u0000\\uD83D\\uDE00\\\\\\/\\\"\"]", true },
	{ "[\"\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\"]", true },
	{ "[\"eight plain bytes and more \x7f\"]", true },
	{ "", false },
	{ " ", false },
	{ "{", false },
	{ "}", false },
	{ "{}{}", false },
	{ "[]x", false },
	{ "[1", false },
	{ "{\"a\"}", false },
	{ "{\"a\":}", false },
	{ "{\"a\":1,}", false },
	{ "{,}", false },
	{ "{1:1}", false },
	{ "{\"a\":1 \"b\":2}", false },
	{ "[1,]", false },
	{ "[,]", false },
	{ "[1 1]", false },
	{ "[01]", false },
	{ "[-]", false },
	{ "[1.]", false },
	{ "[.1]", false },
	{ "[1e]", false },
	{ "[1e+]", false },
	{ "[+1]", false },
	{ "[--1]", false },
	{ "[1e5.5]", false },
	{ "[0x1]", false },
	{ "[tru]", false },
	{ "[truer]", false },
	{ "[nul1]", false },
	{ "[nope]", false },
	{ "[\"\n\"]", false },
	{ "[\"\\a\"]", false },
	{ "[\"\\u12\"]", false },
	{ "[\"\\u12G4\"]", false },
	{ "[\"\xc0\x80\"]", false },
	{ "[\"\xe0\x9f\xbf\"]", false },
	{ "[\"\xed\xa0\x80\"]", false },
	{ "[\"\xf0\x8f\xbf\xbf\"]", false },
	{ "[\"\xf4\x90\x80\x80\"]", false },
	{ "[\"\xc2\"]", false },
	{ "[\"eight plain bytes \x1f and more\"]", false },
	{ "[\"eight plain bytes \xff and more\"]", false },
	{ "[}", false },
	{ "{]", false },
	{ "[\"abc]", false },
};

static void test_json_texts(void)
{
	struct json j = { 0 };

	for (size_t i = 0; i < ARRAY_SIZE(texts); i++) {
		const char *t = texts[i].text, *at;
		size_t n = strlen(t);
		char *copy = malloc(n); /* so that a sanitizer sees one byte too far */

		memcpy(copy, t, n);
		check(!json_parse(&j, copy, n) == texts[i].good, "json_parse", "%s", t);
		free(copy);
		/* the splitter agrees on objects, whatever the pieces */
		for (size_t step = 1; step < 4 && *t == '['; step++) {
			struct split s = { .shape = SPLIT_EVENTS };
			struct buf b = { 0 };
			enum split_got got = SPLIT_MORE;

			buf_printf(&b, " {\"x\":%s}\n", t);
			for (size_t k = 0; k < b.len && got == SPLIT_MORE; k += step) {
				n = b.len - k < step ? b.len - k : step;
				for (at = b.at + k; n && got == SPLIT_MORE;)
					got = split_feed(&s, &at, &n);
			}
			if (got == SPLIT_ITEM && json_take(&j, &s))
				got = SPLIT_BAD;
			check((got == SPLIT_ITEM) == texts[i].good, "split_feed",
			      "%s in pieces of %zu: %d", t, step, got);
			split_free(&s);
			buf_free(&b);
		}
	}
	free(j.tok);
}

static void test_json_values(void)
{
	static const char text[] = "{\"a\":\"x\\u00e9\\ud83d\\ude00\\n\",\"a\":\"y\",\"n\":[0,"
				   "65535,-1,1.0,1e2,99999999999,\"7\",null],"
				   "\"o\":{\"b\":null,\"\\u0063\":\"\\ud800\"},\"e\":[],\"deep\":[{"
				   "\"p\":[1,{\"q\":2}]}]}";
	struct json j = { 0 };
	struct buf b = { 0 };
	int o, i, k = 0;
	long v;

	check(!json_parse(&j, text, strlen(text)), "json_values", "%s", why);
	check(json_eq(&j, json_get(&j, 0, "a"), "y"), "json_last_key_counts", "%d",
	      json_get(&j, 0, "a"));
	check(!json_str(&j, 2, &b) && !strcmp(b.at, "xé😀\n"), "json_str", "%s", b.at);
	check(json_eq(&j, 2, "xé😀\n") && !json_eq(&j, 2, "xé😀") && !json_eq(&j, 2, "xé😀\n!"),
	      "json_eq_escaped", "no");
	for (i = json_first(&j, json_get(&j, 0, "n")); i >= 0;
	     i = json_next(&j, json_get(&j, 0, "n"), i), k++)
		check((json_int(&j, i, 0, 65535, &v) == 0) == (k < 2), "json_int", "element %d", k);
	check(k == 8, "json_next", "%d elements", k);
	o = json_get(&j, 0, "o");
	check(json_get(&j, o, "b") < 0, "json_null_is_absent", "%d", json_get(&j, o, "b"));
	check(json_str(&j, json_get(&j, o, "c"), &b) < 0, "json_lone_surrogate", "taken");
	check(!json_parse(&j, "[\"\\ud83d\\u0041\"]", 16) && json_str(&j, 1, &b) < 0 &&
		      !json_eq(&j, 1, "?"),
	      "json_half_a_pair", "%s", why);
	json_parse(&j, text, strlen(text));
	check(json_first(&j, json_get(&j, 0, "e")) < 0, "json_empty_array", "has elements");
	check(json_get(&j, -1, "a") < 0 && !json_eq(&j, -1, "a") && json_first(&j, -1) < 0,
	      "json_no_token", "taken");
	b.len = 0;
	buf_add(&b, ": ", 2);
	json_path(&j, 0, json_get(&j, json_next(&j, j.n_tok - 7, j.n_tok - 6), "q"), &b);
	i = json_get(&j, 0, "deep");
	i = json_get(&j, json_first(&j, i), "p");
	b.len = 0;
	buf_add(&b, ": ", 2);
	json_path(&j, 0, json_get(&j, json_next(&j, i, json_first(&j, i)), "q"), &b);
	check(!strcmp(b.at, ": deep[0].p[1].q"), "json_path", "%s", b.at);
	buf_free(&b);
	free(j.tok);
}

/* --- splitting: one list, whatever the pieces ------------------------------- */
static void test_split_list(void)
{
	static const char text[] =
		" {\"items\" : [ {\"a\":1} , 22,\"x\\\"]\",[[]] ,null ] , \"b\":{\"items\":[3]},"
		"\"metadata\" :{\"continue\":\"t\"}, \"items\":[]}{\"code\":5} ";
	static const char *const want[] = { "{\"a\":1}",
					    "22",
					    "\"x\\\"]\"",
					    "[[]]",
					    "null",
					    "{\"items\":[0,0,0,0,0],\"b\":{\"items\":[3]},"
					    "\"metadata\":{\"continue\":\"t\"},\"items\":[]}",
					    "{\"code\":5}" };

	for (size_t step = 1; step < sizeof(text); step++) {
		struct split s = { .shape = SPLIT_LIST };
		size_t n = 0;

		for (size_t k = 0; k < strlen(text); k += step) {
			const char *at = text + k;
			size_t left = strlen(at) < step ? strlen(at) : step;
			enum split_got got;

			while ((got = split_feed(&s, &at, &left)) != SPLIT_MORE) {
				check(got == (n < 5 ? SPLIT_ITEM : SPLIT_HEAD) && n < 7 &&
					      s.len == strlen(want[n]) &&
					      !memcmp(s.text, want[n], s.len),
				      "split_list", "%zu: %.*s", n, (int)s.len, s.text);
				check(n != 5 || s.n_lists == 2, "split_n_lists", "%u", s.n_lists);
				if (got == SPLIT_BAD || n++ > 7)
					break;
			}
		}
		check(n == 7 && split_idle(&s), "split_list_whole", "%zu in pieces of %zu", n,
		      step);
		split_free(&s);
	}
}

/* Feeds a text `times` times; how many came, and the memory that is held then. */
static size_t feed(struct split *s, const char *text, size_t times, int *came, bool *long_one)
{
	enum split_got got;
	struct json j = { 0 };

	while (times--) {
		const char *at = text;
		size_t n = strlen(text);

		while (n && (got = split_feed(s, &at, &n)) != SPLIT_MORE && got != SPLIT_BAD) {
			++*came;
			*long_one |= json_take(&j, s) &&
				json_eq(&j, json_get(&j, json_get(&j, 0, "metadata"), "name"), "x");
			check(s->shape == SPLIT_LIST || j.depth == 2, "json_take_depth", "%d",
			      j.depth);
		}
	}
	free(j.tok);
	return s->item.cap + s->head.cap;
}

static void test_split_bounds(void)
{
	static const char spaces[] =
		"                                                                                ";
	struct split s = { .shape = SPLIT_LIST }, e = { .shape = SPLIT_EVENTS };
	int came = 0;
	bool was_long = false;
	size_t held;

	feed(&s, "{\"items\":[{\"metadata\":{\"name\":\"x\"},", 1, &came, &was_long);
	held = feed(&s, spaces, 125000, &came, &was_long);
	check(held < 4096 && !came, "split_ten_million_spaces", "%zu bytes, %d", held, came);
	held = feed(&s, "\"0123456789abcdef\":[\"0123456789abcdef\",{}],", 1000000, &came,
		    &was_long);
	check(held < 2 * (MAX_OBJECT + MAX_EVENT), "split_item_bound", "%zu bytes", held);
	feed(&s, "\"z\":0},", 1, &came, &was_long);
	check(came == 1 && was_long, "split_too_long_is_named", "%d", came);
	was_long = false;
	held = feed(&s, "{}]}", 1, &came, &was_long);
	check(came == 3 && !was_long && held < 200000, "split_goes_on_after_too_long",
	      "%d, %zu bytes", came, held);
	came = 0;
	feed(&e, "{\"type\":\"ADDED\",\"object\":{}}\n", 3, &came, &was_long);
	check(came == 3, "split_events", "%d", came);
	split_free(&s);
	split_free(&e);
}

/* --- addresses ---------------------------------------------------------------- */
static void test_addresses(void)
{
	static const char *const rows[][2] = {
		{ "10.0.0.1", "10.0.0.1" },
		{ "010.00.000.09", "10.0.0.9" },
		{ "::ffff:1.2.3.4", "1.2.3.4" },
		{ "FD00::A", "fd00::a" },
		{ "0:0:0:0:0:0:0:0", "::" },
		{ "2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1" },
		{ "2001:0:0:1:0:0:0:1", "2001:0:0:1::1" },
		{ "2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1" },
		{ "::1.2.3.4", "::102:304" },
		{ "1:2:3:4:5:6:0:0", "1:2:3:4:5:6::" },
		{ "1.2.3", NULL },
		{ "1.2.3.256", NULL },
		{ "1.2.3.4.5", NULL },
		{ "", NULL },
		{ "1..2.3", NULL },
		{ "1.2.3.4 ", NULL },
		{ "::1%lo", NULL },
		{ "1::2::3", NULL },
		{ "12345::", NULL },
		{ ":", NULL },
		{ "+1.2.3.4", NULL },
	};
	static const char *const cidrs[][2] = {
		{ "10.0.0.0/8", "10.0.0.0/8" }, { "fd00::/112", "fd00::/112" },
		{ "0.0.0.0/0", "0.0.0.0/0" },	{ "10.0.0.0/33", NULL },
		{ "10.0.0.0/08", NULL },	{ "10.0.0.0/", NULL },
		{ "10.0.0.0", NULL },		{ "::ffff:1.2.3.4/128", NULL },
		{ "fd00::/129", NULL }
	};
	char text[64];
	struct in6_addr a;
	struct cidr c;

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		bool got = addr_parse(rows[i][0], strlen(rows[i][0]), &a);

		check(got == !!rows[i][1] && (!got || !strcmp(addr_text(&a, text), rows[i][1])),
		      "addr", "%s is %s", rows[i][0], got ? text : "refused");
	}
	for (size_t i = 0; i < ARRAY_SIZE(cidrs); i++) {
		bool got = cidr_parse(cidrs[i][0], strlen(cidrs[i][0]), &c);

		check(got == !!cidrs[i][1] && (!got || !strcmp(cidr_text(&c, text), cidrs[i][1])),
		      "cidr", "%s is %s", cidrs[i][0], got ? text : "refused");
	}
}

/* --- the model under random events -------------------------------------------- */
#define WORLD 40 /* names of services, and twice as many of slices */

static struct options world_options;
static uint64_t dice = 1;

static unsigned roll(unsigned n)
{
	dice = dice * 6364136223846793005u + 1442695040888963407u;
	return (dice >> 33) % n;
}

/* The text of a random object; few addresses, so that many claims collide. */
static char *random_object(enum kind k, int i)
{
	static const char *const policy[] = { "Cluster", "Local" },
				 *const flag[] = { "true", "false", "null" };
	struct buf b = { 0 };

	if (k == NODES) {
		buf_printf(&b,
			   "{\"metadata\":{\"name\":\"pi4\",\"labels\":{\"topology.kubernetes.io/"
			   "zone\":\"z%u\"}}}",
			   roll(3));
	} else if (k == SERVICES) {
		buf_printf(&b,
			   "{\"metadata\":{\"name\":\"s%d\",\"namespace\":\"n%d\","
			   "\"creationTimestamp\":\"2024-01-0%uT00:00:00Z\",\"labels\":{\"a\":\"%"
			   "u\"%s}},"
			   "\"spec\":{\"clusterIP\":\"10.43.0.%u\",\"type\":\"%s\","
			   "\"internalTrafficPolicy\":\"%s\",\"externalTrafficPolicy\":\"%s\","
			   "\"ports\":[{\"name\":\"a\",\"port\":%u},{\"name\":\"b\",\"port\":%u,"
			   "\"protocol\":\"%s\"}],\"externalIPs\":[\"192.168.0.%u\",\"10.43.0.%u\"]"
			   "%s},"
			   "\"status\":{\"loadBalancer\":{\"ingress\":[{\"ip\":\"192.168.0.%u\"},{"
			   "\"ip\":\"10.8.0.%u\"}]}}}",
			   i, i % 3, roll(3) + 1, roll(4),
			   roll(9) ? "" : ",\"service.kubernetes.io/headless\":\"\"", roll(30) + 1,
			   roll(12) ? "ClusterIP" : "ExternalName", policy[roll(2)],
			   policy[roll(2)], 80 + roll(2), 80 + roll(3), roll(2) ? "UDP" : "SCTP",
			   roll(4), roll(60) + 1,
			   roll(3) ? "" : ",\"loadBalancerSourceRanges\":[\"10.0.0.0/8\"]", roll(4),
			   roll(40) + 200);
	} else {
		buf_printf(&b,
			   "{\"metadata\":{\"name\":\"e%d\",\"namespace\":\"n%d\",\"labels\":{"
			   "\"kubernetes.io/service-name\":\"s%u\"}},\"addressType\":\"IPv4\","
			   "\"ports\":[{\"name\":\"a\",\"port\":%u},{\"name\":\"b\",\"port\":81,"
			   "\"protocol\":\"%s\"}],\"endpoints\":[",
			   i, i % 3, roll(WORLD), 8080 + roll(2), roll(2) ? "UDP" : "SCTP");
		for (unsigned n = roll(4); n--;)
			buf_printf(&b,
				   "{\"addresses\":[\"10.42.0.%u\"],\"nodeName\":\"pi%u\","
				   "\"conditions\":{\"ready\":%s,\"serving\":%s,\"terminating\":%s}"
				   ",\"hints\":{\"forZones\":[{\"name\":\"z%u\"}]}}%s",
				   roll(6), 4 + roll(2), flag[roll(3)], flag[roll(3)],
				   flag[roll(3)], roll(3), n ? "," : "");
		buf_printf(&b, "]}");
	}
	return b.at;
}

static int put_text(struct model *m, enum kind k, const char *text, bool delete)
{
	struct json j = { 0 };
	int got = json_parse(&j, text, strlen(text));

	if (delete)
		model_delete(m, k, &j, 0);
	else if (!got)
		got = model_put(m, k, &j, 0);
	free(j.tok);
	return got;
}

/* What the maps stage would hold: each service's entries, kept by its pointer. */
static int drain(struct model *m)
{
	static struct resolved r;
	struct service *s;
	int n = 0;

	model_settle(m);
	for (; (s = model_next_dirty(m)); n++) {
		struct buf *b =
			s->programmed ? s->programmed : (s->programmed = calloc(1, sizeof(*b)));

		resolve_service(m, s, &r);
		b->len = 0;
		print_entries_json(b, r.entries, r.n, false);
		if (s->gone) {
			check(!r.n, "gone_resolves_to_nothing", "%d", r.n);
			buf_free(b);
			free(b);
			s->programmed = NULL;
			model_forget(m, s);
		}
	}
	return n;
}

static void programmed_text(struct model *m, struct buf *out)
{
	size_t n;
	struct service **all = model_sorted(m, &n);

	for (size_t i = 0; i < n; i++)
		buf_add(out,
			((struct buf *)all[i]->programmed)->at ?
				((struct buf *)all[i]->programmed)->at :
				"",
			((struct buf *)all[i]->programmed)->len);
	free(all);
}

/* Empties a model and asks that nothing is left. */
static void empty(struct model *m)
{
	for (enum kind k = 0; k < N_KINDS; k++) {
		model_mark(m, k);
		model_sweep(m, k);
	}
	drain(m);
	check(!m->services.n && !m->objects.n && !m->claims.n && !m->n_without, "nothing_is_left",
	      "%zu services, %zu objects, %zu claims", m->services.n, m->objects.n, m->claims.n);
	for (enum kind k = 0; k < N_KINDS; k++)
		check(!m->n_of[k], "nothing_is_left", "%zu of kind %d", m->n_of[k], k);
	check(!m->n_bad, "nothing_is_left", "%zu bad ones", m->n_bad);
	check(!m->cost, "nothing_is_left", "a cost of %llu", (unsigned long long)m->cost);
	free(m->services.bucket);
	free(m->objects.bucket);
	free(m->claims.bucket);
}

/* VIPs as dealt out by age, the plain way. */
static bool vips_by_age(struct model *m)
{
	struct service *all[WORLD * 2], *at[256] = { 0 };
	size_t n = 0;
	bool good = true;

	TABLE_EACH (&m->services, l)
		if (((struct service *)l)->spec)
			all[n++] = (struct service *)l;
	for (size_t i = 0; i < n; i++)
		for (size_t k = i + 1; k < n; k++)
			if (service_older(all[k], all[i])) {
				struct service *s = all[i];

				all[i] = all[k];
				all[k] = s;
			}
	for (size_t i = 0; i < n; i++) {
		int width = 128 - world_options.vip_range.bits, room = (1 << width) - 2,
		    slot = name_hash(all[i]->ns, all[i]->name) % room, tried = 0;

		while (tried < room && at[slot])
			slot = (slot + 1) % room, tried++;
		if (tried < room)
			at[slot] = all[i];
		good &= tried < room ? all[i]->vip &&
				all[i]->vip->addr.s6_addr[15] ==
					(world_options.vip_range.addr.s6_addr[15] | (slot + 1)) :
				       !all[i]->vip;
	}
	return good;
}

/* After any events the incremental model says what a fresh one says of the same
 * set of objects, put in another order; and everything that changed was dirty. */
static void test_churn(uint64_t seed, const char *vip_range, const char *selector)
{
	struct map_option maps[1] = { 0 };
	char *set[N_KINDS][WORLD * 2] = { 0 };
	struct model m = { 0 };

	dice = seed;
	world_options = (struct options){ .node = "pi4",
					  .selector = selector,
					  .maps = maps,
					  .n_maps = 1,
					  .has_vip_range = true };
	cidr_parse(vip_range, strlen(vip_range), &world_options.vip_range);
	cidr_parse("10.143.0.0/24", 13, &maps[0].from);
	cidr_parse("10.43.0.0/24", 12, &maps[0].to);
	model_init(&m, &world_options);
	check(!model_check(&m), "model_check", "%s", why);
	for (int round = 0; round < 60; round++) {
		struct model fresh = { 0 };
		struct buf have = { 0 }, want = { 0 };

		if (round % 10 == 9) { /* a relist */
			for (enum kind k = 0; k < N_KINDS; k++) {
				model_mark(&m, k);
				for (int i = 0; i < WORLD * 2; i++) {
					if (set[k][i] && !roll(4)) {
						free(set[k][i]);
						set[k][i] = NULL;
					}
					if (set[k][i])
						put_text(&m, k, set[k][i], false);
				}
				model_sweep(&m, k);
			}
		}
		for (unsigned events = roll(round % 3 ? 4 : 60); events--;) {
			enum kind k = roll(20) ? roll(2) : NODES;
			int i = roll(k == SERVICES ? WORLD : k == SLICES ? WORLD * 2 : 1);
			char *text = random_object(k, i);

			put_text(&m, k, text, !roll(3) && set[k][i]);
			free(set[k][i]);
			set[k][i] = NULL;
			dice++; /* what was put is known by asking again */
			if (roll(3)) {
				put_text(&m, k, text, false);
				set[k][i] = text;
			} else {
				put_text(&m, k, text, true);
				free(text);
			}
		}
		drain(&m);
		programmed_text(&m, &have);
		model_init(&fresh, &world_options);
		for (int i = WORLD * 2; i-- > 0;)
			for (enum kind k = 0; k < N_KINDS; k++)
				if (set[k][i])
					put_text(&fresh, k, set[k][i], false);
		drain(&fresh);
		programmed_text(&fresh, &want);
		check(have.len == want.len && !memcmp(have.at, want.at, have.len), "churn",
		      "seed %llu round %d:\nhave %s\nwant %s", (unsigned long long)seed, round,
		      have.at ? have.at : "", want.at ? want.at : "");
		check(vips_by_age(&m), "churn_vips_by_age", "seed %llu round %d",
		      (unsigned long long)seed, round);
		buf_free(&have);
		buf_free(&want);
		empty(&fresh);
	}
	for (enum kind k = 0; k < N_KINDS; k++) { /* the same again: nothing is dirty */
		model_mark(&m, k);
		for (int i = 0; i < WORLD * 2; i++)
			if (set[k][i])
				put_text(&m, k, set[k][i], false);
		model_sweep(&m, k);
	}
	check(!drain(&m), "relist_without_change_makes_nothing_dirty", "seed %llu",
	      (unsigned long long)seed);
	empty(&m);
	for (enum kind k = 0; k < N_KINDS; k++)
		for (int i = 0; i < WORLD * 2; i++)
			free(set[k][i]);
}

static void test_bad_objects(void)
{
	static const char good[] = "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.43."
				   "0.1\",\"ports\":[{\"port\":80}]}}";
	static const char bad[] = "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.43."
				  "0.1\",\"ports\":[{\"port\":0}]}}";
	struct options o = { .node = "pi4" };
	struct model m = { 0 };
	size_t n;

	model_init(&m, &o);
	put_text(&m, SERVICES, good, false);
	drain(&m);
	check(put_text(&m, SERVICES, bad, false) == -1 && !m.repeated, "bad_is_named", "%s", why);
	check(put_text(&m, SERVICES, bad, false) == -1 && m.repeated, "bad_is_named_once", "%s",
	      why);
	check(!drain(&m), "bad_changes_nothing", "dirty");
	model_mark(&m, SERVICES);
	check(put_text(&m, SERVICES, bad, false) == -1 && m.repeated,
	      "bad_is_named_once_over_a_relist", "%s", why);
	model_sweep(&m, SERVICES);
	free(model_sorted(&m, &n));
	check(n == 1 && !drain(&m), "bad_keeps_its_last_good_state_over_a_relist", "%zu", n);
	put_text(&m, SERVICES, good, false);
	check(put_text(&m, SERVICES, bad, false) == -1 && !m.repeated, "bad_again_is_named_again",
	      "%s", why);
	model_mark(&m, SERVICES);
	check(put_text(&m, SERVICES, "{\"metadata\":{}}", false) == -1, "nameless_is_bad", "taken");
	model_sweep(&m, SERVICES);
	free(model_sorted(&m, &n));
	check(n == 1, "nameless_may_be_any_so_nothing_is_swept", "%zu", n);
	model_mark(&m, SERVICES);
	model_sweep(&m, SERVICES);
	free(model_sorted(&m, &n));
	check(!n, "the_next_relist_sweeps", "%zu", n);
	for (int i = 0; i < 20000; i++) { /* a hostile server does not make us grow */
		char text[64];

		snprintf(text, sizeof(text), "{\"metadata\":{\"name\":\"x%d\",\"labels\":5}}", i);
		put_text(&m, SERVICES, text, false);
	}
	check(m.n_bad <= MAX_BAD, "bad_objects_are_bounded", "%zu", m.n_bad);
	model_mark(&m, SERVICES);
	model_sweep(&m, SERVICES);
	empty(&m);
}

/* Another Node, though bad, is none of ours. */
static void test_bad_foreign_node(void)
{
	static const char ours[] = "{\"metadata\":{\"name\":\"pi4\",\"labels\":{"
				   "\"topology.kubernetes.io/zone\":\"z1\"}}}";
	static const char bad[] = "{\"metadata\":{\"name\":\"x\",\"labels\":5}}";
	struct options o = { .node = "pi4" };
	struct model m = { 0 };

	model_init(&m, &o);
	put_text(&m, NODES, ours, false);
	check(put_text(&m, NODES, bad, false) == -1, "bad_node_is_bad", "taken");
	check(!strcmp(m.places.zone, "z1"), "bad_foreign_node_leaves_the_zone", "%s", m.places.zone);
	for (int there = 1; there >= 0; there--) {
		model_mark(&m, NODES);
		put_text(&m, NODES, ours, false);
		if (there)
			put_text(&m, NODES, bad, false);
		model_sweep(&m, NODES);
		check(!strcmp(m.places.zone, "z1"), "bad_foreign_node_leaves_the_zone_over_a_relist",
		      "%s", m.places.zone);
	}
	empty(&m);
}

/* A Service may make so many frontends, by ports, addresses and source ranges; one more is bad. */
static void test_spread(void)
{
	static const struct {
		const char *name;
		int ports, ips, sources;
		bool good;
	} rows[] = {
		{ "ports", MAX_SPREAD, 0, 0, true },	    { "a_port_more", MAX_SPREAD + 1, 0, 0, false },
		{ "addresses", 128, 127, 0, true },	    { "an_address_more", 128, 128, 0, false },
		{ "sources", 128, 0, 127, true },	    { "a_source_more", 128, 0, 128, false },
		{ "no_port", 0, MAX_SPREAD - 1, 0, true },  { "no_port_an_address_more", 0, MAX_SPREAD, 0, false },
	};
	struct options o = { .node = "pi4" };

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		struct model m = { 0 };
		struct buf b = { 0 };
		int got;

		model_init(&m, &o);
		buf_printf(&b, "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.43.0.1\",\"ports\":[");
		for (int k = 0; k < rows[i].ports; k++)
			buf_printf(&b, "%s{\"name\":\"p%d\",\"port\":%d}", k ? "," : "", k, k + 1);
		buf_printf(&b, "],\"externalIPs\":[");
		for (int k = 0; k < rows[i].ips; k++)
			buf_printf(&b, "%s\"10.9.%d.%d\"", k ? "," : "", k >> 8, k & 255);
		buf_printf(&b, "],\"loadBalancerSourceRanges\":[");
		for (int k = 0; k < rows[i].sources; k++)
			buf_printf(&b, "%s\"10.%d.0.0/16\"", k ? "," : "", k);
		buf_printf(&b, "]}}");
		got = put_text(&m, SERVICES, b.at, false);
		check(!got == rows[i].good && (rows[i].good || strstr(why, "Service default/a: spec.ports times")),
		      "spread", "%s: %s", rows[i].name, why);
		check(m.n_of[SERVICES] == rows[i].good, "spread", "%s: kept", rows[i].name);
		buf_free(&b);
		empty(&m);
	}
}

/* All is counted, and not counted any more; what has no room changes nothing that is there. */
static void test_room(void)
{
	static const char small[] = "{\"metadata\":{\"name\":\"%s\"},\"spec\":{\"clusterIP\":\"10.43.0.1\",\"ports\":[{\"port\":80}]}}";
	struct options o = { .node = "pi4" };
	struct model m = { 0 };
	struct json j = { 0 };
	struct object *big;
	char text[256];
	uint64_t cost;
	size_t n;

	model_init(&m, &o);
	snprintf(text, sizeof(text), small, "a");
	json_parse(&j, text, strlen(text));
	for (int change = 0; change < 2; change++) {
		put_text(&m, SERVICES, text, false);
		cost = m.cost;
		big = object_read(&m.filter, SERVICES, &j, 0);
		big->created = 1; /* another, of the same cost */
		check(!model_store(&m, big, cost), "room_for_one_as_large", "%s", why);
		snprintf(text, sizeof(text), small, "b");
		json_parse(&j, text, strlen(text));
		big = object_read(&m.filter, SERVICES, &j, 0);
		check(model_store(&m, big, cost) == -1 && !strncmp(why, "Service default/b has no room", 29),
		      "no_room", "%s", why);
		check(m.repeated == change && m.full[SERVICES] && m.cost == cost, "no_room_is_said_once", "%d", change);
		snprintf(text, sizeof(text), small, "a");
		json_parse(&j, text, strlen(text));
	}
	model_mark(&m, SERVICES);
	check(!m.full[SERVICES], "room_is_asked_for_again_by_each_list", "full");
	snprintf(text, sizeof(text), "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.43.0.1\","
		 "\"ports\":[{\"port\":80},{\"name\":\"more\",\"port\":81}]}}");
	json_parse(&j, text, strlen(text));
	big = object_read(&m.filter, SERVICES, &j, 0);
	check(model_store(&m, big, cost) == -1 && !m.repeated, "no_room_to_grow", "%s", why);
	model_sweep(&m, SERVICES);
	free(model_sorted(&m, &n));
	check(n == 1 && m.cost == cost, "no_room_keeps_the_last_good_state_over_a_relist", "%zu", n);
	free(j.tok);
	empty(&m);
}

static void test_reserved_later(void)
{
	struct options o = { .node = "pi4", .has_vip_range = true };
	struct map_option maps[1] = { 0 };
	struct model m = { 0 };
	struct buf b = { 0 };

	cidr_parse("10.143.0.0/16", 13, &maps[0].from);
	cidr_parse("10.43.0.0/16", 12, &maps[0].to);
	cidr_parse("10.8.0.0/24", 11, &o.vip_range);
	model_init(&m, &o);
	check(!model_check(&m), "model_check", "%s", why);
	put_text(&m, SERVICES,
		 "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.8.0.9\","
		 "\"externalIPs\":[\"10.8.0.7\",\"1.2.3.4\"],\"ports\":[{\"port\":80}]}}",
		 false);
	drain(&m);
	programmed_text(&m, &b);
	check(!strstr(b.at, "10.8.0.9:") && !strstr(b.at, "10.8.0.7:") &&
		      strstr(b.at, "1.2.3.4:80") && strstr(b.at, "10.8.0."),
	      "later_address_in_vip_range_is_not_served", "%s", b.at);
	buf_free(&b);
	empty(&m);
	for (int mapped = 0; mapped < 2; mapped++) { /* nobody takes what --map serves another at */
		o = (struct options){ .node = "pi4", .maps = maps, .n_maps = mapped };
		m = (struct model){ 0 };
		model_init(&m, &o);
		put_text(&m, SERVICES,
			 "{\"metadata\":{\"name\":\"a\"},\"spec\":{\"clusterIP\":\"10.43.0.9\",\"ports\":[{\"port\":80}]}}",
			 false);
		check(!model_check(&m), "model_check", "%s", why);
		put_text(&m, SERVICES,
			 "{\"metadata\":{\"name\":\"b\"},\"spec\":{\"clusterIP\":\"10.44.0.1\","
			 "\"externalIPs\":[\"10.143.0.9\",\"10.143.0.8\"],\"ports\":[{\"port\":80},{\"name\":\"x\",\"port\":81}]}}",
			 false);
		drain(&m);
		programmed_text(&m, &b);
		check(mapped == !strstr(b.at, "10.143.0.8:80") && mapped == !strstr(b.at, "10.143.0.9:81") &&
			      strstr(b.at, "10.143.0.9:80") && strstr(b.at, "10.44.0.1:81"),
		      "mapped_address_is_nobody_elses", "%d: %s", mapped, b.at);
		buf_free(&b);
		empty(&m);
	}
}

/* Ranges under rule 16: they come and go with ServiceCIDRs, by a relist too. */
static void test_ranges(void)
{
	static const char one[] = "{\"metadata\":{\"name\":\"kubernetes\"},\"spec\":{\"cidrs\":["
				  "\"10.43.0.0/16\",\"fd43::1/112\"]}}";
	static const char two[] = "{\"metadata\":{\"name\":\"more\"},\"spec\":{\"cidrs\":["
				  "\"10.44.0.0/16\"]}}";
	static const char bad[] = "{\"metadata\":{\"name\":\"more\"},\"spec\":{\"cidrs\":[5]}}";
	static const struct {
		const char *what, *text;
		bool delete, changed;
		int n;
	} rows[] = {
		{ "one", one, false, true, 2 },	       { "one_again", one, false, false, 2 },
		{ "two", two, false, true, 3 },	       { "bad_keeps_the_last", bad, false, false, 3 },
		{ "deleted", two, true, true, 2 },     { "deleted_again", two, true, false, 2 },
		{ "bad_from_the_start", bad, false, false, 2 },
	};
	struct options o = { .node = "pi4", .has_vip_range = true };
	struct model m = { 0 };
	struct cidr *c;
	struct buf b;

	cidr_parse("10.8.0.0/24", 11, &o.vip_range);
	for (int filtered = 0; filtered < 2; filtered++) {
		o.selector = filtered ? "app" : " ";
		m = (struct model){ 0 };
		model_init(&m, &o);
		check(m.ranges_changed, "ranges_at_first", "not to be written");
		b = model_ranges(&m);
		check(b.len == sizeof(*c), "ranges_without_service_cidrs", "%zu bytes", b.len);
		buf_free(&b);
		for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
			int n = filtered ? 0 : rows[i].n;

			put_text(&m, SERVICE_CIDRS, rows[i].text, rows[i].delete);
			check(m.ranges_changed == rows[i].changed, "ranges_changed", "%s",
			      rows[i].what);
			b = model_ranges(&m);
			c = (struct cidr *)b.at;
			check(b.len / sizeof(*c) == 1 + (size_t)n, "ranges", "%s: %zu bytes",
			      rows[i].what, b.len);
			buf_free(&b);
		}
		model_mark(&m, SERVICE_CIDRS);
		model_sweep(&m, SERVICE_CIDRS);
		b = model_ranges(&m);
		check(b.len == sizeof(*c), "ranges_after_a_relist", "%zu bytes", b.len);
		buf_free(&b);
		empty(&m);
	}
}

/* A file read again, as at SIGHUP. */
static void test_from_again(void)
{
	static const char *const rows[][3] = {
		/* text, names served afterwards, what is wrong */
		{ "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"a\"},"
		  "\"spec\":{\"clusterIP\":\"10.43.0.1\"}}"
		  "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"b\"},"
		  "\"spec\":{\"clusterIP\":\"10.43.0.2\"}}",
		  "ab", NULL },
		{ "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"c\"},"
		  "\"spec\":{\"clusterIP\":\"10.43.0.3\"}} {",
		  "ab", "middle" },
		{ "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"c\"},"
		  "\"spec\":{\"clusterIP\":5}}",
		  "ab", "Service default/c: spec.clusterIP" },
		{ "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"b\"},"
		  "\"spec\":{\"clusterIP\":\"10.43.0.2\"}}",
		  "b", NULL },
		{ "{\"kind\":\"List\"}", "", NULL },
	};
	struct options o = { .node = "pi4" };
	struct model m = { 0 };
	char file[] = "/tmp/unit_data.XXXXXX";
	int fd = mkstemp(file);

	model_init(&m, &o);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		struct service **all;
		char names[8] = "";
		size_t n;
		int got;

		if (ftruncate(fd, 0) || pwrite(fd, rows[i][0], strlen(rows[i][0]), 0) < 0)
			check(false, "from_again", "%s", strerror(errno));
		got = from_read(&m, file);
		all = model_sorted(&m, &n);
		for (size_t k = 0; k < n && k < 7; k++)
			strcat(names, all[k]->name);
		check(!got == !rows[i][2] && (!got || strstr(why, rows[i][2])) &&
			      !strcmp(names, rows[i][1]),
		      "from_again", "%zu: %s, %s", i, names, why);
		drain(&m);
		free(all);
	}
	close(fd);
	unlink(file);
	empty(&m);
}

/* --advertise: what tailscaled has, what is ours of it, what is wanted; the list it is told. */
static void test_routes(void)
{
	static const struct {
		const char *name, *has, *ours, *want, *told; /* NULL: nothing */
		bool sure;
	} rows[] = {
		{ "none", "null", "", "", NULL, true },
		{ "first", "null", "", "10.43.0.0/16", "[\"10.43.0.0/16\"]", true },
		{ "behind_others", "[\"192.168.0.0/16\",\"::/0\"]", "", "10.43.0.0/16 fd43::/112",
		  "[\"192.168.0.0/16\",\"::/0\",\"10.43.0.0/16\",\"fd43::/112\"]", true },
		{ "there", "[\"10.43.0.0/16\"]", "", "10.43.0.0/16", NULL, true },
		{ "there_in_part", "[\"fd43::/112\"]", "", "10.43.0.0/16 fd43::/112",
		  "[\"fd43::/112\",\"10.43.0.0/16\"]", true },
		{ "a_longer_one_is_another", "[\"110.43.0.0/16\",\"10.43.0.0/160\"]", "", "10.43.0.0/16",
		  "[\"110.43.0.0/16\",\"10.43.0.0/160\",\"10.43.0.0/16\"]", true },
		{ "host_bits", "[\"10.43.0.0/16\"]", "", "10.43.9.9/16", NULL, true },
		{ "twice", "[]", "", "10.43.0.0/16 10.43.0.0/16", "[\"10.43.0.0/16\"]", true },
		{ "ours_goes", "[\"1.0.0.0/8\",\"10.43.0.0/16\",\"2.0.0.0/8\"]", "route_10-43-0-0_16", "",
		  "[\"1.0.0.0/8\",\"2.0.0.0/8\"]", true },
		{ "ours_stays_if_not_sure", "[\"10.43.0.0/16\"]", "route_10-43-0-0_16", "", NULL, false },
		{ "others_stay", "[\"10.43.0.0/16\"]", "route_10-44-0-0_16", "", NULL, true },
		{ "ours_goes_to_no_route", "[\"fd43::/112\"]", "route_fd43::_112", "", "[]", true },
		{ "ours_goes_to_no_list", "[\"fd43::/112\"]", "route_fd43::_112 routes_null", "", "null", true },
		{ "null_and_others", "[\"fd43::/112\",\"1.0.0.0/8\"]", "route_fd43::_112 routes_null", "",
		  "[\"1.0.0.0/8\"]", true },
		{ "one_for_another", "[\"10.43.0.0/16\"]", "route_10-43-0-0_16", "10.44.0.0/16",
		  "[\"10.44.0.0/16\"]", true },
		{ "odd_neighbours", "[\"\",\"a\\\"b\",\"%s\"]", "", "::/0",
		  "[\"\",\"a\\\"b\",\"%s\",\"::/0\"]", true },
	};
	char dir[] = "/tmp/unit_data.XXXXXX";

	opt.pin_dir = mkdtemp(dir);
	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		struct buf ranges = { 0 }, want, text = { 0 }, told = { 0 };
		struct json j = { 0 };
		struct routes r;
		char words[128], *save;
		struct cidr c;

		snprintf(words, sizeof(words), "%s", rows[i].ours);
		for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save))
			close(creat(pin_path(w, 0), 0600));
		snprintf(words, sizeof(words), "%s", rows[i].want);
		for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
			cidr_parse(w, strlen(w), &c);
			buf_add(&ranges, &c, sizeof(c));
		}
		want = routes_of(ranges);
		buf_printf(&text, "{\"AdvertiseRoutes\":%s}", rows[i].has);
		json_parse(&j, text.at, text.len);
		r = routes_edit(&j, 0, &want, rows[i].sure);
		if (rows[i].told)
			buf_printf(&told, EDIT_ROUTES "%s}", rows[i].told);
		check(!r.edit.len == !told.len && (!told.len || !strcmp(r.edit.at, told.at)), "routes",
		      "%s: %s", rows[i].name, r.edit.len ? r.edit.at : "nothing");
		snprintf(words, sizeof(words), "%s", rows[i].ours);
		for (char *w = strtok_r(words, " ", &save); w; w = strtok_r(NULL, " ", &save))
			unpin(w, 0);
		routes_free(&r);
		buf_free(&want);
		buf_free(&text);
		buf_free(&told);
		free(j.tok);
	}
	rmdir(dir);
}

/* --- --metrics: what cannot be brought about in a namespace ------------------ */
static void test_metrics(void)
{
	static const struct {
		const char *iface;
		int ifindex, status;
	} rows[] = { { "nosuch0", 0, 200 }, { "lo", 1, 200 }, { "lo", 0, 503 }, { "lo", 999, 503 } };
	static struct agent a = { .n_iface = 1, .n_doors = 1, .status.synced = 1 };
	struct buf out = { 0 };

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		int got;

		strcpy(a.door[0].name, rows[i].iface);
		a.door[0].ifindex = rows[i].ifindex;
		a.door[0].attached = rows[i].ifindex;
		got = ready(&a, &out);
		check(got == rows[i].status, "ready", "%zu: %d, %s", i, got, out.at);
	}
	buf_free(&out);
	for (int i = 0; i < TL_N_REASONS; i++)
		if (!strncmp(reasons[i].key, "flow_", 5) && i != TL_FLOW_TABLE)
			check(TL_EVENTS >> i & 1, "TL_EVENTS", "%s", reasons[i].key);
}

/* --- pauses: doubled by each failure, up to half a minute; half of it is by chance -- */
static void test_pauses(void)
{
	for (unsigned i = 0; i < 24; i++) {
		unsigned failures = i < 21 ? i : i == 21 ? 64 : i == 22 ? 1u << 31 : UINT_MAX;
		int64_t most = 200, least = INT64_MAX, longest = 0;

		for (unsigned n = 0; n < failures && most < 30000; n++)
			most = most * 2 < 30000 ? most * 2 : 30000;
		for (int n = 0; n < 2000; n++) {
			int64_t pause = pause_after(failures);

			least = pause < least ? pause : least;
			longest = pause > longest ? pause : longest;
		}
		check(least >= most / 2 && longest <= most, "pauses",
		      "after %u failures %" PRId64 " to %" PRId64 " ms, should be %" PRId64
		      " to %" PRId64, failures, least, longest, most / 2, most);
		check(least <= most / 20 * 11 && longest >= most / 20 * 19, "pauses by chance",
		      "after %u failures only %" PRId64 " to %" PRId64 " ms of %" PRId64
		      " to %" PRId64, failures, least, longest, most / 2, most);
	}
}

int main(void)
{
	loud = -1;
	test_metrics();
	test_pauses();
	test_json_texts();
	test_json_values();
	test_split_list();
	test_split_bounds();
	test_addresses();
	for (uint64_t seed = 1; seed <= 12; seed++)
		test_churn(seed, seed % 3 == 0 ? "10.8.0.16/28" : "10.8.0.0/26",
			   seed % 2 ? NULL : "a!=3");
	test_bad_objects();
	test_bad_foreign_node();
	test_spread();
	test_room();
	test_reserved_later();
	test_ranges();
	test_from_again();
	test_routes();
	printf("%d passed, %d failed\n", n_passed, n_failed);
	return n_failed > 0;
}
