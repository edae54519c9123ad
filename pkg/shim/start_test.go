package shim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
)

func writeConfig(t testing.TB, bundle string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestLocate: where a sandbox is follows from names, which are checked; nothing
// is made on the way. What the program does with such calls is in TestBadStart.
func TestLocate(t *testing.T) {
	p := &Program{stateRoot: t.TempDir()}
	group := func(name, value string) string { return fmt.Sprintf(`{"annotations":{%q:%q}}`, name, value) }
	in := bootstrap.Invocation{Action: bootstrap.ActionStart, ID: "c1", Namespace: "ns", SocketDir: "/run/s"}
	with := func(change func(*bootstrap.Invocation)) bootstrap.Invocation { in := in; change(&in); return in }
	for _, test := range []struct {
		name   string
		in     bootstrap.Invocation
		config string // none if empty
		dir    string // below the root, or
		err    string
	}{
		{"no specification", in, "", "ns/c1", ""},
		{"no group", in, `{}`, "ns/c1", ""},
		{"a group", in, group(groupAnnotations[0], "g"), "ns/g", ""},
		{"a pod", in, group(groupAnnotations[1], "p"), "ns/p", ""},
		{"a group out of the directory", in, group(groupAnnotations[0], "../../etc"), "", groupAnnotations[0]},
		{"a pod out of the directory", in, group(groupAnnotations[1], ".."), "", groupAnnotations[1]},
		{"a group's absolute path", in, group(groupAnnotations[0], "/etc"), "", groupAnnotations[0]},
		{"a group of two lines", in, group(groupAnnotations[0], "a\nb"), "", groupAnnotations[0]},
		{"a long group", in, group(groupAnnotations[0], strings.Repeat("g", 77)), "", groupAnnotations[0]},
		{"an id out of the directory", with(func(in *bootstrap.Invocation) { in.ID = "../c1" }), `{}`, "", "container id"},
		{"an id that a group hides", with(func(in *bootstrap.Invocation) { in.ID = ".." }), group(groupAnnotations[0], "g"), "", "container id"},
		{"a namespace out of the directory", with(func(in *bootstrap.Invocation) { in.Namespace = ".." }), `{}`, "", `namespace ".."`},
		{"a namespace with a slash", with(func(in *bootstrap.Invocation) { in.Namespace = "a/b" }), `{}`, "", `namespace "a/b"`},
		{"a long socket directory", with(func(in *bootstrap.Invocation) { in.SocketDir = "/" + strings.Repeat("x", 80) }), `{}`, "", "socket_dir"},
		{"no JSON", in, `{"annotations":`, "", "config.json"},
		{"annotations of another type", in, `{"annotations":[]}`, "", "config.json"},
		{"a value of another type", in, `{"annotations":{"a":{}}}`, "", "config.json"},
		{"a large specification", in, strings.Repeat(" ", maxSpec) + `{}`, "", "config.json has more than"},
		{"a deep one", in, `{"process":` + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20) + `}`, "", "config.json"},
	} {
		t.Run(test.name, func(t *testing.T) {
			bundle := t.TempDir()
			if test.config != "" {
				writeConfig(t, bundle, []byte(test.config))
			}
			where, err := p.locate(test.in, bundle)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %.200v does not say %q", err, test.err)
				}
				return
			}
			if err != nil || where.dir.Path != filepath.Join(p.stateRoot, test.dir) {
				t.Errorf("%+v, %v", where, err)
			}
		})
	}
	if list, err := os.ReadDir(p.stateRoot); err != nil || len(list) > 0 {
		t.Errorf("made: %v, %v", list, err)
	}
}

var socketName = regexp.MustCompile("^[0-9a-f]{40}$")

// FuzzStart is the whole of what a caller starts a shim with: arguments, the
// environment, stdin and the bundle's specification. It is refused, or what comes
// of it are a directory below the state's root, a socket in the socket directory,
// and a call of the serving process that is understood as it was meant.
func FuzzStart(f *testing.F) {
	call := func(args ...string) string { return strings.Join(args, "\x00") }
	legacy := call("-namespace", "ns", "-address", "/run/c.sock", "-publish-binary", "/usr/bin/containerd", "-id", "c1", "-debug", "start")
	params := func(change func(*bootapi.BootstrapParams)) []byte {
		p := &bootapi.BootstrapParams{InstanceID: "c1", Namespace: "ns", ContainerdTtrpcAddress: "/run/c.ttrpc", ContainerdGrpcAddress: "/run/c.sock"}
		change(p)
		data, err := proto.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	options := func(o *runtimeoptions.Options) *anypb.Any {
		data, err := proto.Marshal(o)
		if err != nil {
			f.Fatal(err)
		}
		return &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: data}
	}
	plain, err := proto.Marshal(options(&runtimeoptions.Options{ConfigPath: "/etc/a.toml", ConfigBody: []byte("a = \"\xff\"")}))
	if err != nil {
		f.Fatal(err)
	}
	up, long := "../../etc", "/"+strings.Repeat("x", 80)
	pod := `{"annotations":{"io.kubernetes.cri.sandbox-id":"p","io.kubernetes.cri.sandbox-namespace":"n s","io.kubernetes.cri.sandbox-name":"-x\n"}}`
	f.Add(legacy, "/run/c.ttrpc", []byte(nil), []byte(nil))
	f.Add(legacy, "\xff", plain, []byte(pod))
	f.Add(legacy, "", params(func(*bootapi.BootstrapParams) {}), []byte(`{"annotations":{"io.containerd.runc.v2.group":"../../etc"}}`))
	f.Add(legacy, "", params(func(p *bootapi.BootstrapParams) { p.SocketDir = &up }), []byte(`{`))
	f.Add(legacy, "", params(func(p *bootapi.BootstrapParams) { p.SocketDir = &long; p.InstanceID = "c1" }), []byte(`{"annotations":null}`))
	f.Add(legacy, "", params(func(p *bootapi.BootstrapParams) {
		p.Extensions = []*bootapi.Extension{{Value: options(&runtimeoptions.Options{ConfigBody: []byte("debug = true")})}, {}}
	}), []byte(`{"annotations":{"io.containerd.runc.v2.group":"g"}}`))
	f.Add(call("-namespace", "../ns", "-id", "../../c1", "start"), "", []byte(nil), []byte(`{}`))
	f.Add(call("-namespace", "-id", "-id", "-address", "-address", "", "start"), "", []byte(nil), []byte(`{}`))
	f.Add(call("-id=c1", "--namespace=ns", "-debug=false", "--", "start", "start"), "", []byte(nil), []byte(`{}`))
	f.Add(call("-v"), "", []byte(nil), []byte(nil))
	f.Add(call("-namespace", "ns", "-id", "c1", "-bundle", "../..", "delete"), "", []byte(nil), []byte(nil))
	f.Add(call("-namespace", "ns", "-id", "c1"), "", []byte("{}"), []byte(nil))

	bundle := f.TempDir()
	p := &Program{stateRoot: filepath.Join(bundle, "state")} // which is not made
	f.Fuzz(func(t *testing.T, args, address string, stdin, config []byte) {
		writeConfig(t, bundle, config)
		defer alloctest.Limit(t, 4<<20+64*uint64(len(args)+len(stdin)+len(config)))()
		getenv := func(name string) string {
			if name == "TTRPC_ADDRESS" {
				return address
			}
			t.Errorf("%s of the environment is read", name)
			return ""
		}
		in, err := bootstrap.Parse(strings.Split(args, "\x00"), getenv, bytes.NewReader(stdin))
		if err != nil || in.Action != bootstrap.ActionStart {
			return
		}
		where, err := p.locate(in, bundle)
		if list, _ := os.ReadDir(bundle); len(list) != 1 {
			t.Errorf("made: %v", list)
		}
		if err != nil {
			return
		}
		below, err := filepath.Rel(p.stateRoot, where.dir.Path)
		if namespace, group, _ := strings.Cut(below, "/"); err != nil || identifiers.Validate(namespace) != nil || identifiers.Validate(group) != nil || namespace != in.Namespace {
			t.Errorf("the sandbox's directory is %q", where.dir.Path)
		}
		if dir, name := filepath.Split(where.socket); filepath.Clean(dir) != in.SocketDir || !filepath.IsAbs(dir) || !socketName.MatchString(name) || len(where.socket) >= maxSocketPath {
			t.Errorf("the socket is %q, its directory %q", where.socket, in.SocketDir)
		}

		want := bootstrap.Invocation{Action: bootstrap.ActionServe, ID: in.ID, Namespace: in.Namespace, Address: in.Address,
			TTRPCAddress: address, SocketDir: bootstrap.DefaultSocketDir, Debug: in.Debug}
		if got, err := bootstrap.Parse(serveArgs(in, where.pod), getenv, nil); err != nil || got != want {
			t.Errorf("the serving process is called with\n %+v, not\n %+v: %v", got, want, err)
		}
		told := settings{Dir: where.dir, Socket: where.socket, TTRPCAddress: in.TTRPCAddress, Options: in.Options}
		var heard settings
		if data, err := json.Marshal(told); err != nil || json.Unmarshal(data, &heard) != nil || heard != told {
			t.Errorf("it is told\n %+v, and hears\n %+v: %v", told, heard, err)
		}
	})
}
