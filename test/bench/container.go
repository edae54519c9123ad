package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Containers through containerd and ctr: microvm beside runc.
const (
	busybox = "docker.io/microvm/busybox:latest"
	debian  = "docker.io/microvm/debian:bookworm"

	stdioBytes   = 64 << 20
	smallFiles   = 10000
	commandLimit = 10 * time.Minute
)

var runtimes = []struct{ subject, runtime string }{
	{"microvm", "io.containerd.microvm.v2"},
	{"runc", "io.containerd.runc.v2"},
}

func (b *bench) containers() (failed error) {
	state := filepath.Join(b.state, "c")
	stop, err := b.startContainerd(state)
	if err != nil {
		return err
	}
	defer func() { failed = stop(failed) }()
	c := ctr{socket: filepath.Join(state, "containerd.sock"), namespace: "default"}
	if err := c.importImages(busybox, debian); err != nil {
		return err
	}
	if err := b.containerStarts(c); err != nil {
		return err
	}
	for _, r := range runtimes {
		if err := b.runningContainer(c, r.subject, r.runtime); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", r.subject, err))
		}
	}
	return failed
}

// containerStarts measures `ctr run` to the first byte of the container's
// output, and to the end of the command; the runtimes take turns.
func (b *bench) containerStarts(c ctr) error {
	first, whole := map[string][]float64{}, map[string][]float64{}
	for i := range b.runs {
		for _, r := range runtimes {
			begin := time.Now()
			cmd := c.command(context.Background(), "run", "--rm", "--runtime", r.runtime, busybox, fmt.Sprintf("start%d", i), "echo", "x")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				return err
			}
			if err := cmd.Start(); err != nil {
				return err
			}
			n, _ := out.Read(make([]byte, 1))
			at := time.Since(begin)
			io.Copy(io.Discard, out)
			if err := cmd.Wait(); err != nil || n != 1 {
				return fmt.Errorf("ctr run --runtime %s: %v: %s", r.runtime, err, stderr.Bytes())
			}
			first[r.subject] = append(first[r.subject], milliseconds(at))
			whole[r.subject] = append(whole[r.subject], milliseconds(time.Since(begin)))
		}
	}
	for _, r := range runtimes {
		b.add("ctr run", "to first byte", r.subject, "ms", first[r.subject]...)
		b.add("ctr run", "to end", r.subject, "ms", whole[r.subject]...)
	}
	return nil
}

// runningContainer measures a container that lives: exec, stdio, files, memory.
func (b *bench) runningContainer(c ctr, subject, runtime string) error {
	id := "bench-" + subject
	data := filepath.Join(b.state, "data")
	if err := os.MkdirAll(data, 0o777); err != nil {
		return err
	}
	defer os.RemoveAll(data)
	if _, err := c.run("run", "-d", "--runtime", runtime, "--memory-limit", strconv.Itoa(512<<20),
		"--mount", "type=bind,src="+data+",dst=/data,options=rbind:rw", debian, id, "sleep", "1000000"); err != nil {
		return err
	}
	defer func() {
		c.run("tasks", "rm", "-f", id)
		c.run("containers", "rm", id)
	}()
	for _, name := range []string{"containerd-shim-microvm-v2", "microvm-vmm"} {
		if subject != "microvm" {
			break
		}
		if err := b.memoryOfProcess(subject, name); err != nil {
			b.missing("memory of %s: %v", name, err)
		}
	}

	n := 0
	execute := func(argv ...string) (string, time.Duration, error) {
		n++
		begin := time.Now()
		out, err := c.run(append([]string{"tasks", "exec", "--exec-id", fmt.Sprintf("e%d", n), id}, argv...)...)
		return out, time.Since(begin), err
	}
	var latency []float64
	for range 2 * b.runs {
		_, took, err := execute("true")
		if err != nil {
			return err
		}
		latency = append(latency, milliseconds(took))
	}
	b.add("exec", "ctr tasks exec true", subject, "ms", latency...)

	var throughput []float64
	for range 3 {
		out, took, err := execute("head", "-c", strconv.Itoa(stdioBytes), "/dev/zero")
		if err != nil {
			return err
		}
		if len(out) != stdioBytes {
			return fmt.Errorf("%d of %d bytes arrived on stdout", len(out), stdioBytes)
		}
		throughput = append(throughput, float64(stdioBytes)/1e6/took.Seconds())
	}
	b.add("stdio", "stdout", subject, "MB/s", throughput...)

	if err := b.fio("bind mount", subject, "/data/fio", func(argv ...string) (string, error) {
		out, _, err := execute(argv...)
		return out, err
	}); err != nil {
		return err
	}
	_, took, err := execute("sh", "-c", fmt.Sprintf(
		`mkdir /data/small && cd /data/small && i=0; while [ $i -lt %d ]; do echo $i >$i; i=$((i+1)); done; cat * >/dev/null; rm -r /data/small`, smallFiles))
	if err != nil {
		return err
	}
	b.add("bind mount", fmt.Sprintf("%d small files: write, read, remove", smallFiles), subject, "ms", milliseconds(took))
	return nil
}

// fio measures a file or a disk, by running fio in a container.
func (b *bench) fio(group, subject, file string, execute func(argv ...string) (string, error)) error {
	for _, job := range []struct{ name, rw, blockSize string }{
		{"sequential write", "write", "1M"},
		{"sequential read", "read", "1M"},
		{"4k random write", "randwrite", "4k"},
		{"4k random read", "randread", "4k"},
	} {
		out, err := execute("fio", "--name="+job.name, "--filename="+file, "--rw="+job.rw, "--bs="+job.blockSize, "--size=128M",
			"--ioengine=psync", "--runtime=10", "--time_based", "--output-format=terse", "--terse-version=3", "--end_fsync=1")
		if err != nil {
			return err
		}
		field := 6 // read bandwidth in KiB/s, then IOPS, fio's terse format v3
		if strings.HasSuffix(job.rw, "write") {
			field = 47
		}
		fields := strings.Split(strings.TrimSpace(out), ";")
		if len(fields) <= field {
			return fmt.Errorf("fio said: %q", out)
		}
		kib, err := strconv.ParseFloat(fields[field], 64)
		if err != nil {
			return fmt.Errorf("fio said: %q", out)
		}
		b.add(group, job.name, subject, "MB/s", kib*1024/1e6)
	}
	return nil
}

// memoryOfProcess records the memory of the only process of that name.
func (b *bench) memoryOfProcess(subject, name string) error {
	programs, err := processes()
	if err != nil {
		return err
	}
	for pid, program := range programs {
		if filepath.Base(program) != name {
			continue
		}
		m, err := memoryOf(pid)
		if err != nil {
			return err
		}
		b.addMemory(name+" with a container:", subject, m)
		return nil
	}
	return fmt.Errorf("no such process")
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// cache is where hack/tools and hack/images put what they make.
func cache() string {
	if dir := os.Getenv("MICROVM_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(os.Getenv("HOME"), ".cache/microvm")
}

// startContainerd starts a private containerd. stop ends it, and shows the end
// of its log if something failed.
func (b *bench) startContainerd(state string, env ...string) (stop func(failed error) error, err error) {
	script := filepath.Join(b.top, "hack/containerd.sh")
	cmd := exec.Command(script, "start", state)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("start containerd: %w: %s", err, out)
	}
	return func(failed error) error {
		if failed != nil {
			log, _ := os.ReadFile(filepath.Join(state, "containerd.log"))
			fmt.Fprintf(os.Stderr, "the end of containerd's log:\n%s\n", log[max(0, len(log)-4000):])
		}
		if out, err := exec.Command(script, "wipe", state).CombinedOutput(); err != nil {
			failed = errors.Join(failed, fmt.Errorf("stop containerd: %w: %s", err, out))
		}
		return failed
	}, nil
}

// ctr runs containerd's client against the private containerd.
type ctr struct{ socket, namespace string }

func (c ctr) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ctr", append([]string{"-a", c.socket, "-n", c.namespace}, args...)...)
}

// importImages imports those of hack/images, whose archives are named after them.
func (c ctr) importImages(references ...string) error {
	for _, reference := range references {
		name, _, _ := strings.Cut(path.Base(reference), ":")
		if _, err := c.run("images", "import", "--local", filepath.Join(cache(), "images", name+".tar")); err != nil {
			return err
		}
	}
	return nil
}

// run returns what the command wrote to standard output.
func (c ctr) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := c.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return stdout.String(), nil
}
