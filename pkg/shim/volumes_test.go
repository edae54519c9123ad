package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// swap replaces ..data of a volume.
func swap(t *testing.T, dir, data string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, data), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(data, filepath.Join(dir, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, dataLink)); err != nil {
		t.Fatal(err)
	}
}

func TestVolumes(t *testing.T) {
	f := newFixture(t)
	told := make(chan string, 100)
	fail := make(chan error, 1)
	f.agent.SetIntercept(func(method string, request any) (any, error) {
		if r, ok := request.(*agentproto.VolumeRequest); ok {
			told <- fmt.Sprint(r.GetContainerId(), " ", r.GetMount())
			select {
			case err := <-fail:
				return nil, err
			default:
			}
		}
		return nil, nil
	})
	config, other := t.TempDir(), t.TempDir()
	swap(t, config, "..1")
	file := filepath.Join(other, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	create := func(id string) {
		t.Helper()
		bundle := f.bundle(func(spec *specs.Spec) {
			for _, source := range []string{other, file, config} {
				spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/" + filepath.Base(source), Type: "bind", Source: source, Options: []string{"rbind", "ro"}})
			}
		}, "sleep")
		if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: bundle}); err != nil {
			t.Fatal(err)
		}
	}
	create("c1")
	if got := <-told; got != "c1 2" {
		t.Errorf("first told of %s", got)
	}
	// Not a volume's business.
	if err := os.WriteFile(filepath.Join(config, "..new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(config, "..new"), filepath.Join(config, "..other")); err != nil {
		t.Fatal(err)
	}
	swap(t, config, "..2")
	if got := <-told; got != "c1 2" {
		t.Errorf("told of %s", got)
	}
	create("c2")
	if got := <-told; got != "c2 2" {
		t.Errorf("told of %s", got)
	}
	fail <- errors.New("no such mount") // and goes on
	swap(t, config, "..3")
	both := []string{<-told, <-told}
	slices.Sort(both)
	if !slices.Equal(both, []string{"c1 2", "c2 2"}) {
		t.Errorf("told of %q", both)
	}
	f.endAll("c1")
	swap(t, config, "..4")
	if got := <-told; got != "c2 2" {
		t.Errorf("told of %s", got)
	}
	f.endAll("c2")
	select {
	case got := <-told:
		t.Errorf("told of %s too", got)
	default:
	}
}

// The guest is told of nothing that it may have something older of in its caches.
func TestVolumeDelay(t *testing.T) {
	f := newFixture(t)
	f.host.volumeDelay = time.Hour
	dir := t.TempDir()
	swap(t, dir, "..0")
	bundle := f.bundle(func(spec *specs.Spec) {
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: dir, Options: []string{"rbind"}})
	}, "sleep")
	if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		swap(t, dir, fmt.Sprint("..", i+1))
	}
	v := &f.service.sandbox.volumes
	for waiting := 0; waiting != 1; time.Sleep(time.Millisecond) {
		v.mu.Lock()
		waiting = len(v.pending)
		v.mu.Unlock()
	}
	told := 0
	for _, call := range f.agent.Calls() {
		if call == "VolumeChanged" {
			told++
		}
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	f.endAll("c1")
}

func TestDataMoves(t *testing.T) {
	event := func(wd int32, mask uint32, name string) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(wd))
		b = binary.NativeEndian.AppendUint32(b, mask)
		b = binary.NativeEndian.AppendUint32(b, 0)
		padded := name + strings.Repeat("\x00", 16-len(name)%16)
		b = binary.NativeEndian.AppendUint32(b, uint32(len(padded)))
		return append(b, padded...)
	}
	move := event(1, unix.IN_MOVED_TO, "..data")
	for name, tc := range map[string]struct {
		events []byte
		want   []int32
	}{
		"none":           {nil, nil},
		"one":            {move, []int32{1}},
		"twice":          {append(slices.Clone(move), move...), []int32{1}},
		"two":            {append(slices.Clone(move), event(2, unix.IN_MOVED_TO, "..data")...), []int32{1, 2}},
		"another name":   {event(1, unix.IN_MOVED_TO, "..data_tmp"), nil},
		"the watch ends": {event(1, unix.IN_IGNORED, ""), nil},
		"a part":         {move[:len(move)-1], nil},
		"less":           {move[:7], nil},
	} {
		if got := dataMoves(tc.events); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
