package bootstrap

import (
	"bytes"
	"encoding/hex"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// option is how callers wrap runtime options: typeurl's URL has no host.
func option(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: marshal(t, m)}
}

func environment(pairs ...string) func(string) string {
	return func(name string) string {
		for _, p := range pairs {
			if v, ok := strings.CutPrefix(p, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

const (
	grpcAddress  = "/run/containerd/containerd.sock"
	ttrpcAddress = "/run/containerd/containerd.sock.ttrpc"
)

// The calls as the generations of callers make them.
var (
	// containerd 1.6, 1.7 and 2.0 to 2.2; CRI-O leaves out the environment.
	legacyArgs = []string{"-namespace", "default", "-address", grpcAddress,
		"-publish-binary", "/usr/bin/containerd", "-id", "c1", "-debug", "start"}
	// containerd 2.3 and later.
	bootstrapArgs = []string{"-namespace", "default", "-address", grpcAddress,
		"-publish-binary", "/usr/bin/containerd", "-id", "c1", "start"}
	env = environment("TTRPC_ADDRESS="+ttrpcAddress, "GRPC_ADDRESS="+grpcAddress,
		"NAMESPACE=default", "MAX_SHIM_VERSION=2")
)

func bootstrapParams(change func(*bootapi.BootstrapParams)) *bootapi.BootstrapParams {
	p := &bootapi.BootstrapParams{
		InstanceID: "c1", Namespace: "default",
		ContainerdVersion: "2.4.2", ContainerdBinary: "/usr/bin/containerd",
		ContainerdGrpcAddress: grpcAddress, ContainerdTtrpcAddress: ttrpcAddress,
	}
	if change != nil {
		change(p)
	}
	return p
}

func TestStart(t *testing.T) {
	socketDir := "/run/s"
	base := Invocation{Action: ActionStart, ID: "c1", Namespace: "default", Address: grpcAddress,
		TTRPCAddress: ttrpcAddress, SocketDir: DefaultSocketDir}
	with := func(change func(*Invocation)) Invocation { i := base; change(&i); return i }

	for _, test := range []struct {
		name  string
		args  []string
		env   func(string) string
		stdin []byte
		want  Invocation
	}{
		{"1.7 without options", legacyArgs, env, nil, with(func(i *Invocation) { i.Debug = true })},
		{"1.7 with runc's options", legacyArgs, env,
			marshal(t, option(t, &runcoptions.Options{ShimCgroup: "/shims", BinaryName: "runc"})),
			with(func(i *Invocation) { i.Debug = true; i.Options.ShimCgroup = "/shims" })},
		{"2.0 with generic options", legacyArgs, env,
			marshal(t, option(t, &runtimeoptions.Options{ConfigPath: "/etc/a.toml", ConfigBody: []byte("debug = true")})),
			with(func(i *Invocation) {
				i.Debug = true
				i.Options = Options{ConfigPath: "/etc/a.toml", ConfigBody: "debug = true"}
			})},
		{"options of a type unknown here", legacyArgs, env,
			marshal(t, &anypb.Any{TypeUrl: "some.v1.Options", Value: []byte{1, 2, 3}}),
			with(func(i *Invocation) { i.Debug = true })},
		{"garbage on stdin", legacyArgs, env, []byte("\xff\xff\xffhello"),
			with(func(i *Invocation) { i.Debug = true })},
		{"CRI-O", legacyArgs, environment(), nil,
			with(func(i *Invocation) { i.Debug = true; i.TTRPCAddress = "" })},
		{"2.4", bootstrapArgs, env, marshal(t, bootstrapParams(nil)),
			with(func(i *Invocation) { i.Bootstrap = true })},
		{"2.4 debug, options, socket directory", bootstrapArgs, environment(),
			marshal(t, bootstrapParams(func(p *bootapi.BootstrapParams) {
				p.LogLevel = bootapi.LogLevel_LOG_LEVEL_TRACE
				p.SocketDir = &socketDir
				if err := p.AddExtension(option(t, &runcoptions.Options{ShimCgroup: "/shims"})); err != nil {
					t.Fatal(err)
				}
			})),
			with(func(i *Invocation) {
				i.Bootstrap = true
				i.Debug = true
				i.SocketDir = "/run/s"
				i.Options.ShimCgroup = "/shims"
			})},
		{"2.4 with a type URL that names a host", bootstrapArgs, env,
			marshal(t, bootstrapParams(func(p *bootapi.BootstrapParams) {
				if err := p.AddExtension(&runtimeoptions.Options{ConfigPath: "/etc/b.toml"}); err != nil {
					t.Fatal(err)
				}
			})),
			with(func(i *Invocation) { i.Bootstrap = true; i.Options.ConfigPath = "/etc/b.toml" })},
		{"parameters for another task are no parameters", bootstrapArgs, env,
			marshal(t, bootstrapParams(func(p *bootapi.BootstrapParams) { p.InstanceID = "c2" })), base},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := Parse(test.args, test.env, bytes.NewReader(test.stdin))
			if err != nil {
				t.Fatal(err)
			}
			if got != test.want {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
		})
	}
}

// The bytes that each generation of callers reads from stdout.
func TestAnswer(t *testing.T) {
	const address = "unix:///run/containerd/s/0011"
	in := Invocation{}
	if got, err := in.Answer(address); err != nil || string(got) != address {
		t.Errorf("address: %q, %v", got, err)
	}
	in.Bootstrap = true
	got, err := in.Answer(address)
	if err != nil {
		t.Fatal(err)
	}
	want := "0803" + "121d" + hex.EncodeToString([]byte(address)) + "1a05" + hex.EncodeToString([]byte("ttrpc"))
	if !strings.HasPrefix(hex.EncodeToString(got), want) {
		t.Errorf("protobuf: got %x, want %s", got, want)
	}
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(got, &result); err != nil {
		t.Fatal(err)
	}
	var mounts types.MountCapabilities
	if found, err := result.FindExtension(&mounts); !found || err != nil || !slices.Contains(mounts.GetTypes(), "erofs") ||
		!slices.Contains(mounts.GetTransforms(), "format") || !slices.Contains(mounts.GetTransforms(), "mkdir") {
		t.Errorf("mounts %v, %v, %v", &mounts, found, err)
	}
}

func TestOtherActions(t *testing.T) {
	for _, test := range []struct {
		args []string
		want Invocation
	}{
		{[]string{"-v"}, Invocation{Action: ActionVersion}},
		{[]string{"-info"}, Invocation{Action: ActionInfo}},
		{[]string{"-namespace", "k8s.io", "-address", grpcAddress, "-publish-binary", "/c", "-id", "c1", "-bundle", "/b", "delete"},
			Invocation{Action: ActionDelete, ID: "c1", Namespace: "k8s.io", Bundle: "/b", Address: grpcAddress,
				TTRPCAddress: ttrpcAddress, SocketDir: DefaultSocketDir}},
		{[]string{"-namespace", "k8s.io", "-id", "c1", "-address", grpcAddress, "-pod", "default/web"},
			Invocation{Action: ActionServe, ID: "c1", Namespace: "k8s.io", Address: grpcAddress,
				TTRPCAddress: ttrpcAddress, SocketDir: DefaultSocketDir}},
	} {
		got, err := Parse(test.args, env, nil)
		if err != nil {
			t.Errorf("%v: %v", test.args, err)
			continue
		}
		if got != test.want {
			t.Errorf("%v: got %+v, want %+v", test.args, got, test.want)
		}
	}
}

func TestBadInvocation(t *testing.T) {
	relative := "relative"
	for _, test := range []struct {
		name  string
		args  []string
		stdin []byte
		want  string
	}{
		{"no id", []string{"-namespace", "default", "start"}, nil, "-id and -namespace"},
		{"no namespace", []string{"-id", "c1", "start"}, nil, "-id and -namespace"},
		{"unknown action", []string{"-id", "c1", "-namespace", "default", "dance"}, nil, `"dance"`},
		{"unknown flag", []string{"-id", "c1", "-frobnicate"}, nil, "frobnicate"},
		{"too much on stdin", legacyArgs, make([]byte, maxInput+1), "on stdin"},
		{"relative socket directory", bootstrapArgs,
			marshal(t, bootstrapParams(func(p *bootapi.BootstrapParams) { p.SocketDir = &relative })), "absolute"},
		{"broken runtime options", legacyArgs,
			marshal(t, &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0xff}}), "runtime options"},
		{"a configuration that is no text", legacyArgs,
			marshal(t, option(t, &runtimeoptions.Options{ConfigBody: []byte("a = \"\xff\"")})), "UTF-8"},
		{"no value for a flag", []string{"-namespace", "default", "-id"}, nil, "-id"},
		{"an action among the flags", []string{"-id", "c1", "start", "-namespace", "default"}, nil, "-id and -namespace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse(test.args, env, bytes.NewReader(test.stdin))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v does not say %q", err, test.want)
			}
		})
	}
}

// FuzzStdin: whatever arrives on stdin, start either works with it or says
// what is wrong, in each generation's call; and what it takes from there is not
// more than arrived.
func FuzzStdin(f *testing.F) {
	for _, legacy := range []bool{false, true} {
		f.Add([]byte{}, legacy)
		f.Add(marshal(f, bootstrapParams(nil)), legacy)
		f.Add(marshal(f, option(f, &runcoptions.Options{ShimCgroup: "/s"})), legacy)
		f.Add(marshal(f, option(f, &runtimeoptions.Options{ConfigBody: []byte("debug = true")})), legacy)
		f.Add(marshal(f, &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0xff}}), legacy)
	}
	f.Fuzz(func(t *testing.T, stdin []byte, legacy bool) {
		defer alloctest.Limit(t, 4<<20+64*uint64(len(stdin)))()
		args := bootstrapArgs
		if legacy {
			args = legacyArgs
		}
		in, err := Parse(args, env, bytes.NewReader(stdin))
		if err != nil {
			return
		}
		if in.ID != "c1" || in.Namespace != "default" || !filepath.IsAbs(in.SocketDir) {
			t.Fatalf("identity changed: %+v", in)
		}
		if n := len(in.Options.ConfigBody) + len(in.Options.ConfigPath) + len(in.Options.ShimCgroup); n > len(stdin) {
			t.Fatalf("%d bytes of options from %d", n, len(stdin))
		}
		if answer, err := in.Answer("unix:///x"); err != nil || !bytes.Contains(answer, []byte("unix:///x")) {
			t.Fatalf("answer %q, %v", answer, err)
		}
	})
}
