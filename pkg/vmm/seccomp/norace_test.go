//go:build !race

package seccomp

func raceRules() []Rule { return nil }
